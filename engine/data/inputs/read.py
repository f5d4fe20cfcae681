"""A span of any kind of file as documents and faults: the one place that knows which reader serves which kind."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from engine.data.encoding import AsUtf8
from engine.data.inputs import text
from engine.data.inputs.dump import read_articles
from engine.data.inputs.items import Document, Fault, LeftOut
from engine.data.inputs.jsonarray import read_array
from engine.data.inputs.meter import Meter
from engine.data.inputs.parquet import read_rows
from engine.data.inputs.plan import can_cut
from engine.data.inputs.source import Source
from engine.data.unpack import BROKEN, broken, open_stream

_BUFFER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a document is."""

    json_key: str = "text"
    """The key of a document's text in JSON, and its column in parquet."""
    split_text: str = "document"
    """In plain text: "document" (the file), "line", or "blank" (between blank lines)."""


def open_meter(source: Source, start: int, stop: int, options: ReadOptions, block_bytes: int) -> Meter:
    """The measured file a span is read from. Raises OSError."""
    by_lines = can_cut(source, options.split_text) and source.has_lines
    return Meter(source.path, start, stop, begin=max(0, start - 1) if by_lines else start, block_bytes=block_bytes)


def read_span(source: Source, meter: Meter, options: ReadOptions) -> Iterator[Document | Fault | LeftOut]:
    """The documents that begin in the meter's span, in order, and every place where none could be read.

    Lines count from the span's start. Read to its end, this leaves the meter drained."""
    with io.BufferedReader(meter, _BUFFER) as raw:
        last = 0
        try:
            for item in _items(source, raw, meter, options):
                last = item.line
                yield item
        except BROKEN as error:
            yield Fault(last + 1, broken(error, source.compression, source.size))
        try:
            meter.drain()
        except OSError as error:
            yield Fault(last + 1, broken(error, ""))


def _items(source: Source, raw: IO[bytes], meter: Meter, options: ReadOptions) -> Iterator[Document | Fault | LeftOut]:
    """Raises what broken input raises (BROKEN)."""
    if source.kind == "parquet":
        yield from read_rows(source.path, meter.start, meter.stop, options.json_key)
        return
    if source.kind == "dump":
        yield from read_articles(source.path, meter.start, meter.stop, source.encoding)
        return
    stream = open_stream(raw, source.compression, source.path)
    if source.kind == "json":
        yield from read_array(stream, source.encoding, options.json_key)
        return
    encoding = source.encoding
    if not source.lines_are_bytes:
        stream, encoding = io.BufferedReader(AsUtf8(stream, encoding), _BUFFER), "utf-8"
    yield from _text_items(source, stream, encoding, meter, options)


def _text_items(
    source: Source, stream: IO[bytes], encoding: str, meter: Meter, options: ReadOptions
) -> Iterator[Document | Fault]:
    whole = not can_cut(source, options.split_text)
    if source.kind == "text" and options.split_text == "document":
        yield from text.read_whole(stream, encoding)
        return
    start, stop = (0, None) if whole else (meter.start, meter.stop)
    found = text.lines(stream) if stop is None else text.lines_of_span(stream, start, stop)
    if source.kind == "text" and options.split_text == "blank":
        yield from text.read_paragraphs(found, stop, encoding, _begins_inside(source.path, start, stop))
    else:
        yield from text.read_lines(found, stop, encoding, options.json_key if source.kind == "jsonl" else None)


def _begins_inside(path: str, start: int, stop: int | None) -> bool:
    """Whether the first line that begins in a span goes on a paragraph that began before it."""
    if start == 0:
        return False
    with open(path, "rb") as file:
        file.seek(start - 1)
        at = start - 1
        while line := file.readline(_BUFFER):
            at += len(line)
            if line.endswith(b"\n") or (stop is not None and at > stop):
                break
        if not line.endswith(b"\n") or (stop is not None and at >= stop):
            return False  # none begins there
        return text.follows_text(lambda low, high: os.pread(file.fileno(), high - low, low), at)
