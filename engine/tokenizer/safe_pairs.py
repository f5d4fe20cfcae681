"""Where text may be cut without changing its ids.

Byte-pair encoding only ever joins neighbours into a piece of the vocabulary. A join across the boundary between two
characters a and b makes a piece that contains "ab"; where no piece does, nothing crosses the boundary, and what stands
before and after it can be encoded apart. This holds at every step of the merging, so the ids are identical.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

CODE_POINTS = 0x110000
_WINDOW = 1 << 16  # characters
_TAIL, _AFTER_TAIL, _BEFORE_HEAD, _HEAD = 1, 2, 4, 8  # a flag of a second character is twice that of its first
_CONTINUATION = bytes(range(0x80, 0xC0))
_LEAST = (0, 0x80, 0x800, 0x10000)  # the least code point that takes so many continuation bytes
_LEADS = (0, 0xC0, 0xE0, 0xF0)  # what the first byte of such a character holds besides its bits


class SafePairs:
    """The boundaries that some piece of a vocabulary crosses; all others are safe to cut at."""

    def __init__(self, joined: Iterable[tuple[str, str]]) -> None:
        """joined: every two characters that stand side by side in a piece that merging can make."""
        pairs = np.array([(ord(one), ord(two)) for one, two in joined], np.int64).reshape(-1, 2)
        first, second = np.unique(pairs[:, 0]), np.unique(pairs[:, 1])
        self._width = len(second) + 1
        self._first, self._second = _numbered(first), _numbered(second)
        # One bit for each (first, second); row and column 0 belong to characters that begin or end no pair.
        self._bits = np.zeros((len(first) + 1) * self._width // 8 + 1, np.uint8)
        cell = self._first[pairs[:, 0]].astype(np.int64) * self._width + self._second[pairs[:, 1]]
        np.bitwise_or.at(self._bits, cell >> 3, np.uint8(1) << (cell & 7).astype(np.uint8))

    def safe(self, codes: np.ndarray) -> np.ndarray:
        """Code points [n] -> for each boundary between two of them whether text may be cut there, bool [n - 1]."""
        one, two = self._first.take(codes[:-1]), self._second.take(codes[1:])
        answer = (one == 0) | (two == 0)
        near = np.flatnonzero(~answer)
        cell = one[near].astype(np.int64) * self._width + two[near]
        answer[near] = self._bits[cell >> 3] >> (cell & 7).astype(np.uint8) & 1 == 0
        return answer

    def windows(self, text: str) -> Iterator[str]:
        """A text in parts of about _WINDOW characters, cut where it is safe."""
        begin, end = 0, _WINDOW
        while end < len(text):
            codes = np.frombuffer(text[end - 1 : end + 1023].encode("utf-32-le"), "<u4")
            found = np.flatnonzero(self.safe(codes))
            if len(found):
                end += int(found[0])
                yield text[begin:end]
                begin, end = end, end + _WINDOW
            else:
                end += len(codes) - 1 or 1
        yield text[begin:]


def joined_in(pieces: Iterable[str]) -> set[tuple[str, str]]:
    """Every two characters that stand side by side in some piece."""
    found: set[tuple[str, str]] = set()
    for piece in pieces:
        found.update(pairwise(piece))
    return found


class SafeBytePairs(SafePairs):
    """The same for vocabularies of byte strings, whose pieces may begin with the tail of a character and end with the
    head of one. All tails count as one, and so do all heads: some safe boundaries are passed over, no other is cut."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._flags = np.zeros(CODE_POINTS, np.uint8)
        whole: set[tuple[str, str]] = set()
        for piece in pieces:
            for one, two in pairwise(_characters(piece)):
                if isinstance(one, bytes):
                    self._flags[_holders(one)] |= _TAIL
                    self._flags[_holders(two)] |= _AFTER_TAIL
                elif isinstance(two, bytes):
                    self._flags[_holders(one)] |= _BEFORE_HEAD
                    self._flags[_holders(two)] |= _HEAD
                else:
                    whole.add((one, two))
        super().__init__(whole)

    def safe(self, codes: np.ndarray) -> np.ndarray:
        """See SafePairs.safe."""
        flags = self._flags.take(codes)
        # The flag of the second character, moved to where that of the first one is.
        crossed = flags[:-1] & (flags[1:] >> 1) & (_TAIL | _BEFORE_HEAD)
        return super().safe(codes) & (crossed == 0)


def _characters(piece: bytes) -> list[str | bytes]:
    """The characters of a piece, with the tail it begins with and the head it ends with as bytes; nothing for bytes
    that no UTF-8 text holds."""
    body = piece.lstrip(_CONTINUATION)
    answer: list[str | bytes] = [piece[: len(piece) - len(body)]] if len(body) < len(piece) else []
    end = len(body)
    for back in range(1, min(3, end) + 1):  # the last character is cut short if its first byte asks for more
        if body[-back] >= 0xC0:
            end -= back if back <= _continuations(body[-back]) else 0
            break
    try:
        answer += body[:end].decode("utf-8")
    except UnicodeDecodeError:
        return []
    return answer + [body[end:]] if end < len(body) else answer


def _holders(part: str | bytes) -> Any:
    """An index of the code points that are, begin with (a head) or end with (a tail) `part`."""
    if isinstance(part, str):
        return ord(part)
    value = 0
    if part[0] < 0xC0:  # a tail
        for byte in part:
            value = value << 6 | byte & 63
        step = 64 ** len(part)
        least = _LEAST[min(len(part), 3)]
        return slice(least + (value - least) % step, None, step)
    following = _continuations(part[0])
    value = part[0] - _LEADS[following]
    for byte in part[1:]:
        value = value << 6 | byte & 63
    size = 64 ** (following - len(part) + 1)
    return slice(value * size, (value + 1) * size)


def _continuations(lead: int) -> int:
    """How many bytes follow the first one of a character."""
    return 0 if lead < 0xC0 else 1 if lead < 0xE0 else 2 if lead < 0xF0 else 3


def _numbered(codes: np.ndarray) -> np.ndarray:
    """For every code point its place in a sorted array, from 1; 0 where it is not there."""
    table = np.zeros(CODE_POINTS, np.uint16 if len(codes) < 65535 else np.int32)
    table[codes] = np.arange(1, len(codes) + 1)
    return table
