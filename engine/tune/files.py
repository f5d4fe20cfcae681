"""Files of chat rows, row by row, told by what they hold: JSON in any arrangement, CSV and TSV, Parquet; text may be
packed by gzip, bzip2, xz or Zstandard and be in UTF-8 or, by its mark, in UTF-16. Read as the inputs of the
preparation are (engine/data/inputs), in memory that the longest row bounds.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from engine.data.encoding import is_bare_utf16, marked_encoding
from engine.data.inputs.items import BadRecord, Fault
from engine.data.inputs.jsonarray import Window, read_elements, take_value
from engine.data.inputs.parquet import MARKS, check_parquet, read_table
from engine.data.unpack import BROKEN, broken, open_stream, packed_by
from engine.errors import UserError, shown
from engine.signature import refuse_pointer, what_it_is
from engine.tune.rows import ASKED, LISTS, Chat, chat_of

MAX_ROW = 1 << 26
"""Longest row in bytes, unpacked; a longer one is no conversation but an accident or an attack."""
_TABLES = {".csv": ",", ".tsv": "\t"}
_HEAD = 4096
_KINDS = "JSON (.jsonl or .json), CSV or TSV with a header (.csv, .tsv), or Parquet"


def chat_files(spec: str, flag: str = "--data") -> list[Path]:
    """The files that `A,B` names. Raises UserError for one that is missing, named twice, or has a blend's weight."""
    names = [spec] if os.path.exists(spec) else [name.strip() for name in spec.split(",") if name.strip()]
    seen: dict[tuple[int, int], str] = {}
    for name in names:
        of_corpus = Path(name).suffix in (".bin", ".idx") and Path(name).with_suffix(".idx").is_file()
        if of_corpus or not Path(name).is_file():
            raise UserError(_missing(name, flag))
        stat = os.stat(name)
        first = seen.get((stat.st_dev, stat.st_ino))
        if first is not None:
            also = f" (as {shown(first)} too)" if first != name else ""
            raise UserError(f"{flag} names {shown(name)} twice{also}; its rows would be learned twice as often")
        seen[stat.st_dev, stat.st_ino] = name
    if not names:
        raise UserError(f"{flag} {shown(repr(spec))} names no file; tuning reads {_KINDS}")
    return [Path(name) for name in names]


def _missing(name: str, flag: str) -> str:
    weighted = re.fullmatch(r"(.+):([0-9.eE+-]+)", name)
    if weighted and Path(weighted[1]).is_file():
        return (f"{flag} {shown(name)}: tuning has no blend weights, every row of every file is read once an epoch; "
                f"name the files alone: {flag} {shown(weighted[1])}")
    if Path(name).is_dir():
        return f"{flag} {shown(name)} is a folder; name its files, joined by commas"
    if Path(f"{name}.idx").is_file() or Path(name).suffix in (".bin", ".idx"):
        return f"{flag} {shown(name)} is a corpus of token ids; tuning reads files of chat rows, {_KINDS}"
    return (f"{flag} {shown(name)} is not a file; tuning reads files of chat rows, {_KINDS}; `make demo` makes one to "
            "try")


def read_chats(paths: Sequence[str | Path], ignored: Collection[str] = ()) -> Iterator[Chat]:
    """The conversations of files, in order; `ignored` keys are as if absent.

    Raises UserError naming file, line (or row) and keys when a row cannot be understood."""
    for path in paths:
        for where, row in rows_in(Path(path)):
            try:
                yield chat_of(row, ignored)
            except UserError as error:
                raise UserError(f"{where}: {error}{_keys(row)}") from error


def _keys(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    more = f" and {len(row) - 12} more" if len(row) > 12 else ""
    return f" (the row's keys: {', '.join(shown(key, 40) for key in list(row)[:12])}{more})"


def rows_in(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the row as JSON has it) of every row of a file. Raises UserError for what is no such file, and
    for one that holds no row."""
    any_row = False
    for found in _rows_in(path):
        any_row = True
        yield found
    if not any_row:
        size = path.stat().st_size
        what = (f"in {size:,} bytes are blanks, an empty list or a table without rows" if size
                else "it is empty (0 bytes)")
        raise UserError(f"{shown(path)} holds no row: {what}; tuning reads {_KINDS}")


def _rows_in(path: Path) -> Iterator[tuple[str, Any]]:
    name = shown(path)
    if not path.is_file():
        raise UserError(f"{name} is not a file; tuning reads {_KINDS}")
    compression = ""
    try:
        refuse_pointer(path)
        with open(path, "rb") as raw:
            head = raw.peek(_HEAD)
            compression = packed_by(head) or ""
            named = path.suffix.lower() == ".parquet" and not compression and not head.lstrip().startswith((b"{", b"["))
            if head and (named or head.startswith(MARKS)):
                check_parquet(str(path))
                yield from ((f"{name}, row {number}", row) for number, row in read_table(str(path)))
                return
            stream = open_stream(raw, compression, str(path))
            encoding = _encoding(name, _first(path, compression))
            delimiter = _TABLES.get(_ending(path, compression))
            yield from _table(name, stream, encoding, delimiter) if delimiter else _json(name, stream, encoding)
    except BROKEN as error:
        raise UserError(f"{name}: {broken(error, compression, path.stat().st_size)}") from error


def _first(path: Path, compression: str) -> bytes:
    """The first bytes of what a file holds. Raises BROKEN."""
    with open(path, "rb") as raw:
        return open_stream(raw, compression, str(path)).read(_HEAD)


def _encoding(name: str, head: bytes) -> str:
    """The encoding of text. Raises UserError for what is no text."""
    marked = marked_encoding(head)
    if marked is None and is_bare_utf16(head):
        raise UserError(f"{name} looks like UTF-16 without a byte-order mark; save it as UTF-8")
    what = what_it_is(head) if head else None
    if what is not None:
        raise UserError(f"{name} is {what}; tuning reads {_KINDS}")
    return marked or "utf-8"


def _ending(path: Path, compression: str) -> str:
    """The ending that tells a table, behind which a packed file has another."""
    last = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if compression and last not in _TABLES else last


def _json(name: str, stream: IO[bytes], encoding: str) -> Iterator[tuple[str, Any]]:
    """Values of JSON one after another: rows, one a line or spread over many; lists of rows; lists of messages."""
    window = Window(stream, encoding)
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    while following := window.peek():
        where = f"{name}, line {window.here()}"
        if following == "[":
            yield from _list(name, where, window, decoder)
            continue
        try:
            row, whole = take_value(window, decoder, MAX_ROW)
        except BadRecord as error:
            hint = "" if following == "{" else f"; tuning reads {_KINDS}"
            raise UserError(f"{where}: {error}{hint}") from None
        _check_whole(where, whole, encoding)
        yield from _of_object(where, row)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises BadRecord for a key that is there twice: json would keep the last of its values in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadRecord(f'the key "{shown(twice, 80)}" is twice in one object')
    return found


def _list(name: str, where: str, window: Window, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON array, read one by one; or the array itself, where its elements are messages."""
    messages: list[Any] = []
    for number, found in enumerate(read_elements(window, decoder, MAX_ROW), 1):
        place = f"{name}, row {number} (line {found.line})"
        if isinstance(found, Fault):
            raise UserError(f"{place}: {found.message}")
        _check_whole(place, found.whole, window.encoding)
        if messages or (number == 1 and _is_message(found.value)):
            messages.append(found.value)
        else:
            yield place, found.value
    if messages:
        yield where, messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value) and not any(
        key in value for key in (*LISTS, *ASKED))


def _of_object(where: str, row: Any) -> Iterator[tuple[str, Any]]:
    """A row; or the rows under "data", where that is what the object is for."""
    rows = row.get("data") if isinstance(row, dict) and not any(key in row for key in (*LISTS, *ASKED)) else None
    if not isinstance(rows, list):
        yield where, row
        return
    others = [key for key in row if key not in ("data", "version")]
    if others:
        raise UserError(f'{where}: beside "data" stands "{shown(others[0], 80)}"; a file of rows has only the rows')
    for number, one in enumerate(rows, 1):
        yield f'{where}, row {number} of "data"', one


def _check_whole(where: str, whole: bool, encoding: str) -> None:
    if not whole:
        raise UserError(f"{where}: the row holds bytes that are not {encoding.upper()}; save the file as UTF-8")


def _table(name: str, stream: IO[bytes], encoding: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table whose first line has the keys."""
    text = io.TextIOWrapper(stream, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
    csv.field_size_limit(MAX_ROW)  # the process's own; without it a text of 128 KiB is refused
    table = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(table, [])
        twice = next((key for key in header if header.count(key) > 1), None)
        if twice is not None:
            raise UserError(f'{name}: two columns are named "{shown(twice, 80)}"')
        line = table.line_num + 1
        for cells in table:
            if cells and len(cells) != len(header):
                raise UserError(f"{name}, line {line}: {len(cells)} cells, and the header has {len(header)}")
            if cells:
                yield f"{name}, line {line}", dict(zip(header, cells, strict=True))
            line = table.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {line} or later: the text is not {encoding.upper()} ({error.reason}); save the "
                        "file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: not CSV: {error}") from None
