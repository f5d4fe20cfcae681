"""What reading gives: documents, and faults where none could be read; and how the bytes of a record become text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.data.encoding import NO_TEXT as NO_TEXT
from engine.data.encoding import NOT_OF_ENCODING as NOT_OF_ENCODING
from engine.data.encoding import decoder as decoder
from engine.data.encoding import holds_no_text
from engine.errors import shown

MAX_RECORD_BYTES = 16 << 20  # sentencepiece needs about 50 bytes of memory for each byte of a document

_JSON = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string",
         list: "an array", dict: "an object"}


class BadRecord(Exception):
    """One record that cannot be used; the message says why, without file and line."""


class Twice:
    """Stands for the values of a key that an object has more than once."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that is there twice has Twice as its value: json itself would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found[key] = Twice()
            seen.add(key)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=object_of)


class Document(NamedTuple):
    """A document's text, and the line (from 1) it starts at, counted from the span's start; in parquet the row in the
    file, in a dump 0."""

    line: int
    text: str


class LeftOut(NamedTuple):
    """A page of a dump that is no article, and why."""

    line: int
    reason: str


class Fault(NamedTuple):
    """A place where no document could be read: its line as in Document, and why."""

    line: int
    message: str


def lost_whole(paths: Sequence[str]) -> str:
    """One line for files of which nothing could be read while bad records were skipped: no fault of single records,
    which was what the user asked to pass over."""
    named = ", ".join(map(shown, paths[:3])) + (f" and {len(paths) - 3:,} more" if paths[3:] else "")
    which = "an input gives" if len(paths) == 1 else f"{len(paths):,} inputs give"
    return f"{which} nothing but bad records and {'is' if len(paths) == 1 else 'are'} lost whole: {named}"


def decode(data: bytes, encoding: str) -> str:
    """The text of a record's bytes. Raises BadRecord."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if holds_no_text(data):
            raise BadRecord(NOT_OF_ENCODING) from None
        name = "UTF-8" if encoding == "utf-8" else encoding
        hint = "; --encoding names another" if encoding == "utf-8" else ""
        raise BadRecord(f"byte {error.start} of the record is not {name} (0x{data[error.start]:02x}){hint}") from None


def check_whole(text: str) -> str:
    """The text itself. Raises BadRecord when it holds half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"the text holds a lone surrogate U+{ord(text[error.start]):04X}, half a character") from None
    return text


def text_of_line(line: str, json_key: str) -> str | None:
    """The document in a line of JSONL; None for a blank line. Raises BadRecord."""
    line = line.lstrip("\ufeff")  # where files were put together that each began with a mark
    if not line or line.isspace():
        return None
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None
    if isinstance(row, list):
        raise BadRecord("an array; one object a line is needed (or one array in a file that ends in .json)")
    return text_of_row(row, json_key)


def text_of_row(row: Any, json_key: str) -> str:
    """The document in a row: the text under json_key, or a list of texts there, as lines. Raises BadRecord."""
    if not isinstance(row, dict):
        raise BadRecord(f"{_JSON[type(row)]}, not an object")
    if json_key not in row:
        keys = ", ".join(map(shown, list(row)[:8])) or "no keys"
        raise BadRecord(f'no "{json_key}"; the row has {keys} (choose with --json-key)')
    value = row[json_key]
    if isinstance(value, Twice):
        raise BadRecord(f'the key "{json_key}" is there twice')
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise BadRecord(f'"{json_key}" is {_JSON[type(value)]}, not text')
    return check_whole(value)
