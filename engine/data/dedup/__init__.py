"""Deduplication of any number of documents: a signature each, computed anywhere, and one place that compares them.

    method = parse_method("near")             # in every worker: method.signatures(texts)
    with Deduplicator(folder, method) as deduplicator:
        deduplicator.add(first_id, signatures)  # in the order of the documents
        dropped = deduplicator.finish()
    dropped.is_dropped(ids)
"""

from __future__ import annotations

import re

from engine.data.dedup.exact import Exact
from engine.data.dedup.external import Deduplicator, Method
from engine.data.dedup.groups import Dropped
from engine.data.dedup.minhash import BANDS, ROWS, MinHash
from engine.errors import UserError, nearest

__all__ = ["Deduplicator", "Dropped", "Exact", "Method", "MinHash", "parse_method"]


def parse_method(spec: str) -> Exact | MinHash | None:
    """"none", "exact", "near" (14 bands of 8 rows) or "near:20x5". Raises UserError for anything else."""
    name, _, numbers = spec.partition(":")
    if name == "near":
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", numbers or f"{BANDS}x{ROWS}", re.ASCII)
        if found:
            return MinHash(int(found[1]), int(found[2]))
    elif not numbers and name in ("none", "exact"):
        return Exact() if name == "exact" else None
    hint = nearest(name, ["none", "exact", "near"])
    raise UserError(
        f'"{spec}" is no way to deduplicate; known are none, exact, near ({BANDS} bands x {ROWS} rows) and near:20x5'
        + (f"; did you mean {hint}?" if hint and hint != name else "")
    )
