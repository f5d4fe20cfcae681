"""Raw text files as documents: JSONL and plain text, also gzipped; every fault named with its file and line.

Reading is split in two so that the slow half can run in other processes: `Source.records` cuts a file into raw
records in constant memory, `parse` turns one into text.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError, nearest

MAX_RECORD_BYTES = 16 << 20  # sentencepiece needs about 50 bytes of memory for each byte of a document
SPLITS = ("document", "line", "blank")
_JSON, _TEXT = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md")


class BadRecord(Exception):
    """One record that cannot be used; the message says why, without file and line."""


@dataclass(frozen=True)
class Record:
    """The raw bytes of one document, and the line (from 1) it starts at."""

    line: int
    data: bytes


@dataclass(frozen=True)
class Fault:
    """A place where no record could be read."""

    line: int
    message: str


class _Tracked(io.RawIOBase):
    """A file that hashes what is read from it, so that inputs are read once."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)
        self.sha256, self.position = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class Source:
    """One input file. After `records` is exhausted, `sha256` is that of the whole file."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when the file is missing or of an unknown kind."""
        self.path = Path(path)
        if self.path.is_dir():
            raise UserError(f"{path} is a folder; name the files in it, such as {path}/*.jsonl")
        try:
            with open(self.path, "rb"):
                pass
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        self.zipped = self.path.suffix == ".gz"
        ending = Path(self.path.stem if self.zipped else self.path.name).suffix.lower()
        if ending not in _JSON + _TEXT:
            hint = nearest(ending, _JSON + _TEXT)
            raise UserError(
                f"{path} ends in {ending or 'nothing'}; known are {', '.join(_JSON + _TEXT)}, each also with .gz"
                + (f"; did you mean {hint}?" if hint else "")
            )
        self.is_json = ending in _JSON
        self.size = self.path.stat().st_size
        self.position, self.sha256 = 0, ""

    def records(self, split_text: str = "document") -> Iterator[Record | Fault]:
        """The file's raw records in order. split_text: what is a document in plain text: the whole "document" (file),
        each "line", or what stands between "blank" lines."""
        tracked = _Tracked(self.path)
        with io.BufferedReader(tracked, 1 << 20) as raw:
            lines = _Lines(gzip.GzipFile(fileobj=raw) if self.zipped else raw)
            try:
                for item in self._split(lines, split_text):
                    self.position = tracked.position
                    yield item
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield Fault(lines.number, f"the gzip file is broken or cut short: {error}")
            except OSError as error:
                yield Fault(lines.number, f"cannot be read: {error.strerror or error}")
            while raw.read(1 << 20):  # what a fault left unread still belongs to the file's hash
                pass
            self.position, self.sha256 = tracked.position, tracked.sha256.hexdigest()

    def _split(self, lines: _Lines, split_text: str) -> Iterator[Record | Fault]:
        if lines.is_utf16():
            yield Fault(1, "the file is UTF-16; convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)")
        elif self.is_json or split_text == "line":
            yield from lines
        elif split_text == "blank":
            yield from _joined(lines)
        else:
            yield lines.rest()


class _Lines:
    """The lines of a stream, none held in memory beyond MAX_RECORD_BYTES; `number` is the line last begun, from 1."""

    def __init__(self, stream: IO[bytes] | io.BufferedIOBase) -> None:
        self._stream = stream
        self.number = 1
        self._first: bytes | None = None

    def is_utf16(self) -> bool:
        """Looks at the first line, and drops a UTF-8 byte-order mark."""
        self._first = self._stream.readline(MAX_RECORD_BYTES + 1)
        if self._first.startswith((b"\xff\xfe", b"\xfe\xff")):
            return True
        self._first = self._first.removeprefix(b"\xef\xbb\xbf")
        return False

    def _next(self) -> bytes:
        if self._first is not None:
            line, self._first = self._first, None
            return line or self._stream.readline(MAX_RECORD_BYTES + 1)
        return self._stream.readline(MAX_RECORD_BYTES + 1)

    def __iter__(self) -> Iterator[Record | Fault]:
        while line := self._next():
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                yield Fault(self.number, f"the line is longer than {MAX_RECORD_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = self._stream.readline(1 << 20)
            else:
                yield Record(self.number, line.rstrip(b"\r\n"))
            self.number += 1

    def rest(self) -> Record | Fault:
        """All that is left, as one record."""
        data = self._next()
        data += self._stream.read(max(0, MAX_RECORD_BYTES + 1 - len(data)))
        if len(data) > MAX_RECORD_BYTES:
            return Fault(1, f"the document is longer than {MAX_RECORD_BYTES:,} bytes; use --split-text blank or line")
        return Record(1, data)


def _joined(lines: _Lines) -> Iterator[Record | Fault]:
    """Runs of lines that are not blank, each as one record."""
    held: list[bytes] = []
    size = start = 0
    for item in lines:
        if isinstance(item, Fault) or not item.data.strip():
            if held:
                yield Record(start, b"\n".join(held))
            held, size = [], 0
            if isinstance(item, Fault):
                yield item
            continue
        start = item.line if not held else start
        held.append(item.data)
        size += len(item.data) + 1
        if size > MAX_RECORD_BYTES:
            yield Fault(start, f"the paragraph is longer than {MAX_RECORD_BYTES:,} bytes; use --split-text line")
            held, size = [], 0
    if held:
        yield Record(start, b"\n".join(held))


def parse(data: bytes, is_json: bool, json_key: str) -> str | None:
    """The text of one raw record; None for a blank line of JSONL. Raises BadRecord."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"byte {error.start} of the record is not UTF-8 (0x{data[error.start]:02x})") from None
    if is_json:
        if not text.strip():
            return None
        text = _field(text, json_key)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"the text holds a lone surrogate U+{ord(text[error.start]):04X}, half a character") from None
    return text if is_json else text.replace("\r\n", "\n")


def _field(line: str, json_key: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None
    if isinstance(row, list):
        raise BadRecord("a JSON array; one object a line is needed (jq -c '.[]' makes that)")
    if not isinstance(row, dict):
        raise BadRecord(f"a JSON {type(row).__name__}, not an object")
    if json_key not in row:
        keys = ", ".join(list(row)[:8]) or "no keys"
        raise BadRecord(f'no "{json_key}"; the row has {keys} (choose with --json-key)')
    if not isinstance(row[json_key], str):
        raise BadRecord(f'"{json_key}" is {type(row[json_key]).__name__}, not text')
    return str(row[json_key])


def read_documents(
    paths: Sequence[str], json_key: str = "text", split_text: str = "document", byte_limit: int | None = None
) -> Iterator[str]:
    """The documents of files in order; with byte_limit about that many bytes, an equal share of each file.

    Raises UserError at the first fault, naming file and line."""
    for path in paths:
        source, left = Source(path), (byte_limit // len(paths) if byte_limit else None)
        for item in source.records(split_text):
            if isinstance(item, Fault):
                raise UserError(f"{path}:{item.line}: {item.message}")
            try:
                text = parse(item.data, source.is_json, json_key)
            except BadRecord as error:
                raise UserError(f"{path}:{item.line}: {error}") from None
            if text and text.strip():
                yield text
            if left is not None:
                left -= len(item.data)
                if left <= 0:
                    break
