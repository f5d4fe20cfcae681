"""JSON from files that may be hostile: no duplicate keys, no NaN, no surprise but one clear error."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import UserError, shown
from engine.signature import refuse_pointer


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; UserError naming `what` for anything else, duplicate keys and NaN included."""
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise UserError(f"{what} is not read: its JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_object(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{path} has {size} bytes, more than the {limit} such a file may have")
        refuse_pointer(path)
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = Counter(names).most_common(1)[0][0]  # counting each by itself would be quadratic
        raise ValueError(f"the key '{shown(twice, 100)}' stands twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
