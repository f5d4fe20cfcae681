"""Many texts to ids: put together into blocks, cut into segments, and looked up at once."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import regex

from engine.tokenizer.base import groups
from engine.tokenizer.safe_pairs import SafePairs
from engine.tokenizer.segments import PADDING, SegmentMemo, gathered

WORDS_BLOCK, CHARACTERS_BLOCK = 1 << 20, 1 << 18
"""Characters encoded at a time, by each way of cutting. With fewer the calls of numpy are much of the time."""
_WINDOW = 1 << 16  # characters of one text encoded apart from its others
_SPARSE, _BEGINNING = 32, 1 << 12
ALNUM = string.ascii_letters + string.digits
ASCII, BEYOND = ("".join(map(chr, range(first, first + 128))) for first in (0, 128))
"""Byte values as characters: one of BEYOND is a part of a character that is not ASCII."""

Cutter = Callable[[bytes, np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""UTF-8 of several texts, and where each ends in it -> the bounds and codes that SegmentMemo.ids_of takes."""


class BlockEncoder:
    """Texts to ids by one way of cutting."""

    def __init__(self, memo: SegmentMemo, cutter: Cutter, windows: Callable[[str], Iterator[str]], block: int) -> None:
        """windows: the parts of a long text that may be encoded apart. block: characters encoded at a time."""
        self._memo, self._cutter, self._windows, self._size = memo, cutter, windows, block

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as bytes. Raises UnicodeEncodeError for a lone surrogate."""
        ids: list[bytes] = []
        for group in groups(texts, self._size):
            parts = list(self._windows(group[0])) if len(group) == 1 else []
            ids += [b"".join(self.encode(parts))] if len(parts) > 1 else self._block(group)
        return ids

    def spans(self, buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for texts that are parts of a buffer: see segments.Spans."""
        raw, stops = gathered(np.frombuffer(buffer, np.uint8), starts, ends - starts)
        return self._ids_of(raw.tobytes(), stops)

    def _block(self, texts: Sequence[str]) -> list[bytes]:
        encoded = [text.encode("utf-8") for text in texts]
        ids, stops = self._ids_of(b"".join(encoded), np.cumsum(list(map(len, encoded)), dtype=np.int64))
        flat, item = ids.tobytes(), ids.itemsize
        return [flat[begin * item : end * item] for begin, end in pairwise([0, *stops.tolist()])]

    def _ids_of(self, text: bytes, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Several texts one after another, and where each ends -> all ids, and where those of each text end."""
        bounds, codes = self._cutter(text, ends)
        ids, id_ends = self._memo.ids_of(text + PADDING, bounds, codes)
        return ids, np.concatenate(([0], id_ends))[np.searchsorted(bounds, ends)]


def flags(*classes: str) -> bytes:
    """For each byte value a bit for each of the classes that it is in as a character below 256, the lowest first."""
    table = bytearray(256)
    for bit, members in enumerate(classes):
        for byte in members.encode("latin-1"):
            table[byte] |= 1 << bit
    return bytes(table)


def ends_of_words(last: bytes, first: bytes, text: bytes) -> np.ndarray:
    """UTF-8 [n] -> whether a word ends before each byte, bool [n + 1]: where the flags of the byte before it in `last`
    and its own in `first` have a class in common."""
    ends = np.zeros(len(text) + 1, bool)
    one, two = (np.frombuffer(text.translate(table), np.uint8) for table in (last, first))
    ends[1:-1] = one[:-1] & two[1:]
    return ends


def at_words(ends_of: Callable[[bytes], np.ndarray]) -> Cutter:
    """Cuts where words end. ends_of: UTF-8 [n] -> bool [n + 1], as `ends_of_words` has it."""

    def cut(text: bytes, ends: np.ndarray) -> tuple[np.ndarray, None]:
        begins = ends_of(text)
        begins[0] = begins[ends] = True
        return np.flatnonzero(begins), None

    return cut


def at_pairs(pairs: SafePairs | None, pieces: Callable[[bytes, np.ndarray], np.ndarray] | None = None) -> Cutter:
    """Cuts at every safe pair, and where a pre-tokenizer's pieces end. pieces: UTF-8 of several texts, and where each
    ends in it -> where all pieces end, in characters."""

    def cut(text: bytes, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = text.decode("utf-8")
        codes = np.frombuffer(whole.encode("utf-32-le"), "<i4")
        place = None  # of each character in bytes, and the end, where they are not the same
        if len(whole) < len(text):
            place = np.append(np.flatnonzero(np.frombuffer(text, np.int8) > -65), len(text))  # all but continuations
        begins = np.zeros(len(whole) + 1, bool)
        if pairs is not None:
            begins[1:-1] = pairs.safe(codes)
        if pieces is not None:
            begins[pieces(text, ends)] = True
        begins[0] = begins[ends if place is None else np.searchsorted(place, ends)] = True
        found = np.flatnonzero(begins)
        lone = codes.take(found[:-1])
        lone[np.diff(found) > 1] = -1
        return found if place is None else place.take(found), lone

    return cut


def windows(text: str, breaks: re.Pattern[str] | regex.Pattern[str]) -> Iterator[str]:
    """Parts of a long text, about _WINDOW characters each, that start where `breaks` matches."""
    begin = 0
    while len(text) - begin > _WINDOW and (found := breaks.search(text, begin + _WINDOW)):
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]


def by_density(texts: Sequence[str], words: BlockEncoder, characters: BlockEncoder) -> list[bytes]:
    """Texts that begin with a space in every few characters by words, the others by characters: the quicker way."""
    worded = [text.count(" ", 0, _BEGINNING) * _SPARSE >= min(len(text), _BEGINNING) for text in texts]
    some = iter(words.encode([text for text, one in zip(texts, worded, strict=True) if one]))
    others = iter(characters.encode([text for text, one in zip(texts, worded, strict=True) if not one]))
    return [next(some) if one else next(others) for one in worded]
