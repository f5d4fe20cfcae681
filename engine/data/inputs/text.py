"""JSONL and plain text: lines, paragraphs and whole files, each in memory that MAX_RECORD_BYTES bounds.

A span's reader begins one byte before the span and drops what it reads up to the first line's end: so the line that
begins at the span's first byte is this span's, and one that began earlier is not.
"""

from __future__ import annotations

import math
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from engine.data.inputs.items import (
    MAX_RECORD_BYTES,
    BadRecord,
    Document,
    Fault,
    check_whole,
    decode,
    text_of_line,
)

_CUT = "it may be cut short"
_BLANK = b" \t\r\x0b\x0c"


class Line(NamedTuple):
    """A line without its end: number in the span from 1, byte offset, content; None where it is too long. is_ended:
    whether it has an end; the last of a file that was cut short has none."""

    number: int
    offset: int
    data: bytes | None
    is_ended: bool = True


def lines(stream: IO[bytes], offset: int = 0, number: int = 1, stop: float = math.inf) -> Iterator[Line]:
    """The lines of a stream whose next byte lies at `offset`. UTF-8's mark at byte 0 is no part of the first.

    What comes after a line that is too long is a line only if it begins before `stop`: no more is read of that one."""
    limit = MAX_RECORD_BYTES
    while line := stream.readline(limit + 1):
        begin, offset = offset, offset + len(line)
        if len(line) > limit and not line.endswith(b"\n"):
            yield Line(number, begin, None)
            offset += _pass_over(stream, stop - offset)
        else:
            content = (line if begin else line.removeprefix(BOM_UTF8)).rstrip(b"\r\n")
            yield Line(number, begin, content, line.endswith(b"\n"))
        number += 1


def _pass_over(stream: IO[bytes], enough: float) -> int:
    """Reads to the end of the line, or until `enough` bytes are read: how many they were."""
    size = 0
    while size < enough and (line := stream.readline(1 << 20)):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def lines_of_span(stream: IO[bytes], start: int, stop: int) -> Iterator[Line]:
    """The lines that begin at byte `start` or later, of a stream that stands one byte before it (or at 0); none where
    no line begins in [start, stop), so that a line of many spans is not read through in each.

    The first is number 1 where it begins at `start`, else 2: its number counts the line ends of the span before it."""
    if start == 0:
        return lines(stream, stop=stop)
    offset = start - 1 + _pass_over(stream, stop - start + 1)
    return lines(stream, offset, 1 if offset == start else 2, stop) if offset < stop else iter(())


def read_lines(
    found: Iterator[Line], stop: int | None, encoding: str, json_key: str | None
) -> Iterator[Document | Fault]:
    """A document a line, of the lines that begin before `stop`; of JSONL, with json_key, its rows."""
    for number, offset, data, is_ended in found:
        if stop is not None and offset >= stop:
            return
        if data is None:
            yield Fault(number, f"the line is longer than {MAX_RECORD_BYTES:,} bytes")
            continue
        try:
            text = decode(data, encoding)
            document = check_whole(text) if json_key is None else text_of_line(text, json_key)
        except BadRecord as error:
            yield Fault(number, str(error) if is_ended else f"{error}; the file ends within this line: {_CUT}")
            continue
        if document is not None:
            yield Document(number, document)


def read_paragraphs(
    found: Iterator[Line], stop: int | None, encoding: str, inside: bool
) -> Iterator[Document | Fault]:
    """A document a run of lines that are not blank, of the runs that begin before `stop`. inside: the first line goes
    on a run that began before the span, which is its span's. One too long is a fault up to the next blank line."""
    held: list[bytes] = []
    size = start = 0
    for number, offset, data, _ in found:
        if data is not None and not data.strip():
            if held and not inside:
                yield _paragraph(start, held, size, encoding)
            held, size, inside = [], 0, False
        elif stop is not None and offset >= stop and (size > MAX_RECORD_BYTES + 1 or not held):
            break  # what begins here is another span's, and of one too long nothing more need be known
        elif not inside:
            if not held:
                start = number
            size += MAX_RECORD_BYTES + 2 if data is None else len(data) + 1
            if data is None or size > MAX_RECORD_BYTES + 1:
                held = [b""]  # only remembers that a paragraph has begun
            else:
                held.append(data)
    if held:
        yield _paragraph(start, held, size, encoding)


def _paragraph(start: int, held: list[bytes], size: int, encoding: str) -> Document | Fault:
    if size > MAX_RECORD_BYTES + 1:
        return Fault(start, f"the paragraph is longer than {MAX_RECORD_BYTES:,} bytes; use --split-text line")
    return _text(start, b"\n".join(held), encoding)


def read_whole(stream: IO[bytes], encoding: str) -> Iterator[Document | Fault]:
    """The file as one document."""
    data = stream.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        yield Fault(1, f"the document is longer than {MAX_RECORD_BYTES:,} bytes; use --split-text blank or line")
    else:
        yield _text(1, data.removeprefix(BOM_UTF8), encoding)


def _text(line: int, data: bytes, encoding: str) -> Document | Fault:
    try:
        return Document(line, check_whole(decode(data, encoding)).replace("\r\n", "\n"))
    except BadRecord as error:
        return Fault(line, str(error))


def follows_text(read_back: Callable[[int, int], bytes], offset: int) -> bool:
    """Whether the line before the one at byte `offset` > 0 holds more than blanks, or is too long to tell, as it is for
    `lines`. read_back(start, stop) gives bytes of the file."""
    stop = offset - 1  # where that line's end stands
    while stop > 0:
        if offset - 1 - stop > MAX_RECORD_BYTES:
            return True
        start = max(0, stop - 4096)
        block = read_back(start, stop)
        line = block[block.rfind(b"\n") + 1 :]
        if not start:
            line = line.removeprefix(BOM_UTF8)
        if line.strip(_BLANK):
            return True
        if len(line) < len(block) or start == 0:
            return False
        stop = start
    return False
