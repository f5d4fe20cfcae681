"""What a run was trained on, in a few numbers: read at once from data of any size, kept with every checkpoint."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.blend import parse_spec
from engine.data.indexed import IndexedDataset, with_suffix
from engine.errors import shown

Fingerprint = Sequence[Mapping[str, Any]]
"""For each corpus or file, where it lay ("path") and what it was."""

_CONTENT = ("bytes", "crc32", "documents", "tokens", "dtype", "bin_crc32", "idx_crc32")
"""What is the same of two copies."""
_ENDS = 1 << 16  # bytes looked at from either end of a file


def of_corpora(spec: str) -> list[dict[str, Any]]:
    """The corpora of "PREFIX" or a blend: shares, counts, and checksums of the ends of their files. P.json, where there
    is one, speaks for what lies between: it has the inputs' checksums. Raises UserError when one does not open."""
    found = []
    named = parse_spec(spec)
    whole = sum(weight for _, weight in named)
    for prefix, weight in named:
        corpus = IndexedDataset(prefix)
        info = with_suffix(prefix, ".json")
        found.append({"path": prefix, "share": str(weight / whole), "documents": corpus.documents,
                      "tokens": len(corpus.tokens), "dtype": corpus.dtype.name,
                      "bin_crc32": _crc_of_ends(corpus.bin_path), "idx_crc32": _crc_of_ends(corpus.idx_path),
                      "json_crc32": zlib.crc32(info.read_bytes()) if info.is_file() else None})
    return found


def of_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Files of rows."""
    return [{"path": str(path), "bytes": os.path.getsize(path), "crc32": _crc_of_ends(path)} for path in paths]


def copies(found: Fingerprint) -> list[tuple[int, int]]:
    """The corpora or files that hold what one before them holds, as far as sizes and the checksums of their ends tell:
    (place of the first, place of the copy). Empty ones are none."""
    first: dict[tuple[Any, ...], int] = {}
    pairs = []
    for number, one in enumerate(found):
        what = tuple(one.get(name) for name in _CONTENT)
        before = first.setdefault(what, number)
        if before != number and (one.get("tokens") or one.get("bytes")):
            pairs.append((before, number))
    return pairs


def copy_notes(found: Fingerprint) -> list[str]:
    """A line for each copy among what a run is trained on."""
    return [f"--data: {shown(found[copy]['path'])} holds the same as {shown(found[first]['path'])}, by sizes and "
            "checksums: what they hold is learned more often" for first, copy in copies(found)]


def difference(then: Any, now: Fingerprint) -> str | None:
    """What is different in what a run reads now, in words; None when nothing is. Another path is no difference, nor is
    what only one of them tells. `then` may be anything, as it comes from a file."""
    if not isinstance(then, list) or not all(isinstance(one, dict) for one in then):
        return f"what it was trained on is told as {shown(then, 80)}, which is no list of corpora"
    if len(then) != len(now):
        return f"it was trained on {_paths(then)}, not on {_paths(now)}"
    for old, new in zip(then, now, strict=True):
        both = [name for name, value in new.items() if name != "path" and None not in (value, old.get(name))]
        if not both:  # a corpus and rows: no number of the one stands for anything of the other
            return f"it was trained on {_paths([old])}, {_kind(old)}, and {shown(new['path'])} is {_kind(new)}"
        for name in both:
            if new[name] != old[name]:
                return (f"it was trained on {_paths([old])} with {name} {shown(old[name], 40)}, and "
                        f"{shown(new['path'])} has {name} {new[name]}")
    return None


def _kind(one: Mapping[str, Any]) -> str:
    if "tokens" in one:
        return "a corpus of token ids"
    return "a file of rows" if "bytes" in one else "of which nothing else is told"


def _paths(found: Fingerprint) -> str:
    return " and ".join(shown(one.get("path")) for one in found[:8])


def _crc_of_ends(path: Path) -> int:
    """The checksum of a file's first and last 64 KiB."""
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(_ENDS))
        file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
        return zlib.crc32(file.read(_ENDS), crc)
