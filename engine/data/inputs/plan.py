"""The work in units: byte ranges of the input, each read and encoded by one process.

Units depend on the files alone, never on the number of workers. Nothing is scanned to find them: a range is cut at a
multiple of the unit's size wherever that falls, and a record belongs to the range in which its first byte lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.data.inputs.source import Source

UNIT_BYTES = 16 << 20
_LEAST_BYTES = 2 << 20
_ENOUGH_UNITS = 64  # so many are shared out evenly; what a run of many smaller ones costs is not worth it
_MAX_UNITS = 8192  # more would be a burden to folders and to memory; beyond 128 GB units grow


class Span(NamedTuple):
    """Bytes [start, stop) of source number `source`."""

    source: int
    start: int
    stop: int


Unit = tuple[Span, ...]
"""What is read together: a part of a large file, or several small files."""


def plan(sources: Sequence[Source], split_text: str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of a job, in the input's order. They cover every byte of every file once.

    unit_bytes: how much a unit holds, at least; files that cannot be cut are larger."""
    total = sum(source.size for source in sources)
    size = unit_bytes * max(1, -(-total // (unit_bytes * _MAX_UNITS)))
    units: list[Unit] = []
    held: list[Span] = []
    weight = 0
    for span in _spans(sources, split_text, size):
        if held and weight + span.stop - span.start > size:
            units.append(tuple(held))
            held, weight = [], 0
        held.append(span)
        weight += span.stop - span.start
    return [*units, tuple(held)] if held else units


def _spans(sources: Sequence[Source], split_text: str, size: int) -> Iterator[Span]:
    for number, source in enumerate(sources):
        step = size if can_cut(source, split_text) else max(source.size, 1)
        for start in range(0, max(source.size, 1), step):
            yield Span(number, start, min(start + step, source.size))


def unit_bytes_of(total: int) -> int:
    """The size of the units of an input of `total` bytes: a power of two, at most UNIT_BYTES."""
    size = UNIT_BYTES
    while size > _LEAST_BYTES and total < size * _ENOUGH_UNITS:
        size >>= 1
    return size


def can_cut(source: Source, split_text: str) -> bool:
    """Whether the file can be read from the middle."""
    if source.kind == "parquet":
        return True  # by row groups
    if source.kind == "dump":  # by pages or by the streams of bzip2, where their bytes can be searched for tags
        return source.compression in ("", "bz2") and source.encoding == "utf-8"
    if source.compression or not source.lines_are_bytes:
        return False
    return source.kind == "jsonl" or (source.kind == "text" and split_text != "document")
