"""Segments of text and their ids, remembered: most of a corpus is the same words again.

A memo is a dict from a segment to its ids as raw bytes, so that a document's ids are one `bytes.join` over one `map`,
with no Python work for each token. What is not there yet is collected and encoded by the reference in one batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

LONGEST = 64
"""Characters of a segment that is remembered; longer ones hardly come twice."""
LIMIT_BYTES = 96 << 20
"""Memory a memo may take. It is emptied when full: what is common comes back at once."""
_OVERHEAD = 200  # bytes that Python spends on one entry: str and bytes headers, and the dict's own share
_WINDOW = 1 << 18  # characters of one text cut at a time

Ids = Sequence[int]


class Memo(dict[str, "bytes | bytearray"]):
    """Segment -> its ids as bytes.

    Use: `found = [*map(memo.__getitem__, segments)]`, then `memo.fill()`, then `b"".join(found)`. A segment that is
    not known is given an empty bytearray, which `fill` writes its ids into: nothing is looked up twice.
    """

    def __init__(self, encode: Callable[[list[str]], list[bytes]], limit_bytes: int = LIMIT_BYTES) -> None:
        """encode: segments to the bytes of their ids, exact whatever stands around them."""
        super().__init__()
        self._encode, self._limit = encode, limit_bytes
        self._segments: list[str] = []  # asked for and not known, with their slots
        self._slots: list[bytearray] = []
        self._used = 0

    def __missing__(self, segment: str) -> bytearray:
        slot = bytearray()
        self._segments.append(segment)
        self._slots.append(slot)
        if len(segment) <= LONGEST:
            self[segment] = slot
        return slot

    def fill(self) -> None:
        """Encodes all segments that were asked for and not known. Whatever `encode` raises leaves none behind."""
        if not self._segments:
            return
        segments, self._segments = self._segments, []
        slots, self._slots = self._slots, []
        try:
            encoded = self._encode(segments)
        except BaseException:
            for segment in segments:
                self.pop(segment, None)
            raise
        for segment, slot, ids in zip(segments, slots, encoded, strict=True):
            slot += ids
            if len(segment) <= LONGEST:
                self[segment] = ids  # half the memory of a bytearray
        self._used += sum(map(len, segments)) * 2 + sum(map(len, encoded)) + _OVERHEAD * len(segments)
        if self._used > self._limit:
            self.clear()
            self._used = 0


def packed(ids: Sequence[Ids], dtype: np.dtype[Any]) -> list[bytes]:
    """Lists of ids as raw bytes."""
    flat = np.fromiter(chain.from_iterable(ids), dtype, sum(map(len, ids))).tobytes()
    answer, at = [], 0
    for one in ids:
        end = at + len(one) * dtype.itemsize
        answer.append(flat[at:end])
        at = end
    return answer


def windows(text: str, breaks: re.Pattern[str]) -> Iterator[str]:
    """Parts of a long text, about _WINDOW characters each, that start where `breaks` matches."""
    begin = 0
    while len(text) - begin > _WINDOW and (found := breaks.search(text, begin + _WINDOW)):
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]


def at_first_spaces(text: str, glue: str, others: Sequence[str] = ()) -> list[str]:
    """A text cut at the first space of every run; the run's other spaces become `glue` before the next word.

    others: whitespace that begins a run too, and is left where it is."""
    if "  " in text:
        text = text.replace("  ", " " + glue).replace(glue + " ", glue + glue)  # "    " -> " ▁ ▁" -> " ▁▁▁"
    for other in others:
        if other + " " in text:
            text = text.replace(other + " ", other + glue)
    return text.split(" ")


def spaced(text: str, sparse: int = 16) -> bool:
    """Whether a text has a space in every `sparse` characters or so, and is quickest cut into words."""
    return text.count(" ") * sparse >= len(text)
