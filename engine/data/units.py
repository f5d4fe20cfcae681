"""Text as units in numpy: words where a script writes spaces between them, single characters where it does not.

A unit is a maximal run of letters, numbers and the marks on them, or one letter of a script without spaces (Chinese,
Japanese, Thai, Lao, Khmer, Burmese) with its marks. Punctuation, symbols and spaces separate units and belong to none.
Near-duplicate detection compares runs of units, quality rules count them.

No Python loop runs over characters: a text becomes an array of code points, a unit's hash is the difference of two
prefix sums of c[i] B^i mod 2^64 divided by B^start (B is odd, so it has an inverse), and equal words hash alike
wherever they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import regex

OTHER, SPACE, MARK, NUMBER, LETTER, SPACELESS = range(6)
"""What a character is; from MARK on it belongs to a unit."""

_WORD, _SIGN = 8, 5
"""What a word and a letter of a script without spaces weigh in a run: 5 words and 8 Chinese characters weigh the same.
Chinese words have 1.5 to 1.7 characters on average, so that a run breaks equally easily under an edit in both; in mixed
text a run has its share of each."""

WORDS_IN_CHARACTERS = _WORD / _SIGN

_PIECE = 1 << 15  # characters worked on at once: arrays of 8 bytes a character stay in a core's second-level cache
_BASE = 0xD1342543DE82EF95
_KINDS_END = 0x40000  # nothing above is assigned but variation selectors, tags and private use, which are OTHER
_SPACELESS = "".join(f"\\p{{scx={name}}}" for name in ("Han", "Hira", "Kana", "Bopo", "Thai", "Laoo", "Khmr", "Mymr"))
_CLASSES = {
    SPACE: r"\s+", MARK: r"\p{M}+", NUMBER: r"\p{N}+", LETTER: r"\p{L}+",
    SPACELESS: rf"(?V1)[[\p{{L}}\p{{Nl}}]&&[{_SPACELESS}]]+",
}
_BREAK = regex.compile(r"\s")


def _powers(base: int) -> np.ndarray:
    """base^0, base^1, ... mod 2^64 for every position of a piece, which may be up to twice _PIECE long."""
    steps = np.full(2 * _PIECE + 2, base, np.uint64)
    steps[0] = 1
    return np.multiply.accumulate(steps)


_UP, _DOWN = _powers(_BASE), _powers(pow(_BASE, -1, 1 << 64))


@cache
def _kinds() -> np.ndarray:
    """The kind of each code point, uint8."""
    table = np.zeros(_KINDS_END, np.uint8)
    every = "".join(map(chr, range(_KINDS_END)))
    for kind, pattern in _CLASSES.items():
        for found in regex.finditer(pattern, every):
            table[found.start() : found.end()] = kind
    table[-1] = OTHER  # stands for everything beyond
    return table


@cache
def _ascii_kinds() -> bytes:
    return _kinds()[:128].tobytes() + bytes(128)


class Units(NamedTuple):
    """The units of a text in order; arrays of one length."""

    starts: np.ndarray
    """Where each begins, in characters, int64."""
    ends: np.ndarray
    """Where each ends, exclusive, int64."""
    hashes: np.ndarray
    """64-bit hash of its characters, uint64."""
    spaceless: np.ndarray
    """Whether it is a letter of a script without spaces, bool."""


def characters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Code points (uint8 for ASCII text, else uint32) and kinds (uint8). Lone surrogates are OTHER."""
    if text.isascii():
        raw = text.encode("ascii")
        return np.frombuffer(raw, np.uint8), np.frombuffer(raw.translate(_ascii_kinds()), np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return codes, _kinds().take(codes, mode="clip")


def units(text: str) -> Units:
    """The units of a text. Give it lower-cased text where case must not matter."""
    if len(text) <= _PIECE:
        return _units(text, 0)
    parts = [_units(piece, at) for at, piece in _pieces(text)]
    return Units(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def scramble(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that leaves no pattern (the finaliser of splitmix64); works in place, returns its input."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


@cache
def constants(count: int, stream: int) -> np.ndarray:
    """Odd pseudo-random uint64 [count], the same on every machine and with every numpy. stream: which of many."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream << 32)
        return scramble(counter) | np.uint64(1)


def weigh(spaceless: np.ndarray) -> np.ndarray:
    """The weight of all units before each, and of all: int64 [units + 1]."""
    before = np.zeros(len(spaceless) + 1, np.int64)
    np.cumsum(np.where(spaceless, _SIGN, _WORD), out=before[1:])
    return before


def run_lengths(before: np.ndarray, words: int) -> int | np.ndarray:
    """How many units the shortest run has that begins at each unit and weighs `words` words or more: one number where
    all are words, else int64, shorter than the units by the last ones, which have no such run. before: weigh()."""
    if before[-1] == _WORD * (len(before) - 1):
        return words
    target = words * _WORD
    lengths = np.full(np.searchsorted(before, before[-1] - target, side="right"), words)
    for length in range(words, -(-target // _SIGN)):  # where so many are too light, one more
        here = max(min(len(lengths), len(before) - length), 0)
        lengths[:here] += before[length : length + here] < before[:here] + target
    return lengths


def run_sums(hashes: np.ndarray, lengths: int | np.ndarray) -> np.ndarray:
    """Equal for equal runs of units, else different, but not evenly spread: uint64 [runs]. Run i begins at unit i and
    has lengths[i] of them; where lengths is one number, all runs of so many."""
    if isinstance(lengths, int):
        count, least, most = max(len(hashes) - lengths + 1, 0), lengths, lengths
    else:
        count, least, most = len(lengths), int(lengths.min(initial=1)), int(lengths.max(initial=0))
    total = np.zeros(count, np.uint64)
    for shift, factor in enumerate(constants(most, 1)):
        here = max(min(count, len(hashes) - shift), 0)
        term = hashes[shift : shift + here] * factor
        if shift >= least:
            term *= lengths[:here] > shift  # type: ignore[index]
        total[:here] += term
    return total


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A long text in pieces with their places, cut before white space or, where there is none for long, anywhere."""
    at = 0
    while at < len(text):
        end = at + 2 * _PIECE
        found = _BREAK.search(text, at + _PIECE, end)
        end = found.start() if found else end
        yield at, text[at:end]
        at = end


def _units(piece: str, at: int) -> Units:
    """The units of a piece that begins `at` characters into its text."""
    codes, kinds = characters(f" {piece} ")  # every unit then has a neighbour on both sides
    starts, ends = _bounds(kinds)
    sums = np.cumsum(codes * _UP[: len(codes)])
    hashes = (sums[ends - 1] - sums[starts - 1]) * _DOWN[starts]
    spaceless = np.zeros(len(starts), bool) if codes.dtype == np.uint8 else kinds[starts] == SPACELESS
    return Units(starts + (at - 1), ends + (at - 1), hashes, spaceless)


def _bounds(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where units begin and end."""
    inside = kinds >= MARK
    own = kinds == SPACELESS
    before, here = inside[:-1], inside[1:]
    if not own.any():
        edges = np.flatnonzero(before != here) + 1
        return edges[0::2], edges[1::2]
    word = kinds[1:] >= NUMBER  # such a letter ends before a word that follows it; a mark stays with it
    begins = here & (own[1:] | ~before | (own[:-1] & word))
    ends = before & (begins | ~here)
    return np.flatnonzero(begins) + 1, np.flatnonzero(ends) + 1
