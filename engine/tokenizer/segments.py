"""Segments of text and their ids, remembered in numpy: most of a corpus is the same words again.

A segment of up to 55 bytes is a key of three or seven 64-bit numbers: its bytes, and in the last byte its length. All
segments of a block of text are looked up at once in a hash table of such keys, compared in full, so that no two are
ever mistaken for each other; and all ids are gathered at once. There is no Python work for each word or token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from engine.tokenizer.safe_pairs import CODE_POINTS

LIMIT_BYTES = 96 << 20
"""Memory that one memo may take. It is emptied when full: what is common comes back at once."""
PADDING = bytes(64)
"""Has to follow the text in a buffer, as keys are read in whole."""

Ids = Sequence[int]
Spans = Callable[[bytes, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A buffer of UTF-8 (with PADDING), and where segments start and end in it [n] -> the ids of all of them one after
another, and for each segment where its ids end [n]."""

_WIDTHS = (3, 7)  # 64-bit numbers in a key; a segment must be shorter than its key by the byte for its length
_LONG = len(_WIDTHS)
_KINDS = np.repeat(np.arange(_LONG + 1, dtype=np.uint8), (24, 32, 1))  # which of them has a length's keys
_MASKS = {  # keeps the first 0, 1, 2.. bytes of a key
    width: (np.tri(8 * width, 8 * width, -1, np.uint8) * np.uint8(255)).view("<u8") for width in _WIDTHS
}
_BEGIN = (1 << 32) - 1
_FIRST_SLOTS = 1 << 12
_LONGEST_KEPT, _RECENT = 1 << 10, 1 << 11  # bytes, and segments: most are rulers, as "-----+", again and again
_AT_ONCE = 1 << 15  # rows moved: with more, what is worked on leaves the cache
_LARGE = 1 << 20  # numbers: up to there a table grows fourfold, which saves time, then twofold, for memory


class _Characters:
    """Code points [n, 1] -> values, by a plain array."""

    def __init__(self) -> None:
        self._values = np.full(CODE_POINTS, -1, np.int64)

    def find(self, codes: np.ndarray) -> np.ndarray:
        """See Table.find; of codes [n], where -1 is none and gives any value."""
        return self._values.take(codes)

    def insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        """See Table.insert."""
        self._values[keys[:, 0]] = values


class Table:
    """Keys [n, width] -> values [n], int64, not negative. A row of the table is a key and its value, for widths 1, 3
    and 7 a part of one cache line.

    Open addressing, at most half full, going on by 1, 2, 3.. rows. The multipliers are odd and random (Dietzfelbinger
    et al. 1997), so that no text can be made to collide."""

    def __init__(self, width: int) -> None:
        """width: of keys, in 64-bit numbers, of which the last is never 0."""
        self._width = width
        self._factors = [np.uint64(secrets.randbits(64) | 1) for _ in range(width + 1)]
        self._used = self._last = 0
        self._rows = np.zeros((_FIRST_SLOTS, width + 1), "<u8")

    @property
    def nbytes_next(self) -> int:
        """The memory it takes when as many keys come as came last."""
        return self._slots(self._used + self._last) * self._rows.strides[0]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The value of each key; -1 where it is not there."""
        slot = self._home(keys)
        rows = self._rows.take(slot, axis=0)
        found = rows[:, -1].astype(np.int64)
        left, step = np.arange(len(keys)), 0
        while True:
            others = np.flatnonzero(~self._equal(rows, keys[left] if step else keys))
            if not len(others):
                return found
            left, taken = left[others], rows[others, -2] != 0
            found[left[~taken]] = -1
            left, step = left[taken], step + 1
            slot[left] = (slot[left] + step) & (len(self._rows) - 1)
            rows = self._rows.take(slot[left], axis=0)
            found[left] = rows[:, -1]

    def insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Adds keys that are not there, each once."""
        self._last = len(keys)
        self._used += self._last
        slots = self._slots(self._used)
        if slots > len(self._rows):
            old = self._rows[self._rows[:, -2] != 0]
            self._rows = np.zeros((slots, self._width + 1), "<u8")
            for at in range(0, len(old), _AT_ONCE):
                self._place(old[at : at + _AT_ONCE])
        self._place(np.column_stack([keys, values.astype("<u8")]))

    def _slots(self, keys: int) -> int:
        """How many rows there are when it holds so many keys."""
        if 2 * keys <= len(self._rows):
            return len(self._rows)
        slots = 1 << (2 * keys - 1).bit_length()
        return slots if slots * (self._width + 1) > _LARGE else 2 * slots

    def _place(self, rows: np.ndarray) -> None:
        taken, values = self._rows[:, -2], self._rows[:, -1]
        table, given = (one.view(f"V{8 * self._width + 8}")[:, 0] for one in (self._rows, rows))  # rows as a whole
        slot, left, step = self._home(rows), np.arange(len(rows)), 0
        while len(left):
            free = taken[slot] == 0
            at, new = slot[free], left[free]
            values[at] = new  # of several for one slot, the last written takes it
            won = values[at] == new
            table[at[won]] = given[new[won]]
            free[free] = won
            left, step = left[~free], step + 1
            slot = (slot[~free] + step) & (len(self._rows) - 1)

    def _equal(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        same = rows[:, 0] == keys[:, 0]
        for place in range(1, self._width):
            same &= rows[:, place] == keys[:, place]
        return same

    def _home(self, keys: np.ndarray) -> np.ndarray:
        mixed = keys[:, 0] * self._factors[0]
        for place in range(1, self._width):
            mixed ^= keys[:, place] * self._factors[place]
        mixed ^= mixed >> np.uint64(29)
        mixed *= self._factors[-1]
        return (mixed >> np.uint64(64 - (len(self._rows) - 1).bit_length())).astype(np.int64)


@dataclass(frozen=True)
class _Block:
    """Segments of a buffer, and what is known of each."""

    buffer: bytes
    bounds: np.ndarray  # where each begins, and where the last ends [n + 1]
    places: np.ndarray  # of its ids, see _places [n]


@dataclass(frozen=True)
class _Unknown:
    """Segments that a table did not hold."""

    table: Table | _Characters
    keys: np.ndarray  # [n, width]
    where: np.ndarray  # which of the block's segments they are [n]


class SegmentMemo:
    """The ids of segments. Those of up to 55 bytes are remembered, of longer ones the last few."""

    def __init__(self, encode: Spans, dtype: np.dtype[Any], limit_bytes: int | None = None) -> None:
        """encode: gives the ids of segments not seen before, exact whatever stands around them. limit_bytes: memory it
        may take, LIMIT_BYTES by default."""
        self._encode, self._dtype = encode, dtype
        self._limit = LIMIT_BYTES if limit_bytes is None else limit_bytes
        self._tables: list[Table]
        self._characters: _Characters | None
        self._ids: np.ndarray
        self._filled: int  # how much of it is in use
        self._clear()

    @property
    def nbytes_next(self) -> int:
        """The memory it takes, but for single characters and long segments, when as many come as came last."""
        return sum(table.nbytes_next for table in self._tables) + self._ids.nbytes

    def ids_of(
        self, buffer: bytes, bounds: np.ndarray, codes: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Segments from each of `bounds` to the next one -> what Spans give. codes: for segments of one character its
        code point, else -1; left out where those need no short cut."""
        lengths = np.diff(bounds)
        kinds = _KINDS.take(lengths, mode="clip")
        unknown = []
        if codes is None:
            block = _Block(buffer, bounds, np.empty(len(lengths), np.int64))
        else:
            self._characters = self._characters or _Characters()
            block = _Block(buffer, bounds, self._characters.find(codes))
            lone = codes >= 0
            kinds[lone] = 255
            missing = np.flatnonzero(lone & (block.places < 0))
            if len(missing):
                unknown.append(_Unknown(self._characters, codes[missing, np.newaxis], missing))
        for kind, (table, width) in enumerate(zip(self._tables, _WIDTHS, strict=True)):
            which = np.flatnonzero(kinds == kind)
            if len(which):
                keys = _keys(buffer, bounds[which], lengths[which], width)
                block.places[which] = found = table.find(keys)
                missing = np.flatnonzero(found < 0)
                if len(missing):
                    unknown.append(_Unknown(table, keys[missing], which[missing]))
        self._learn(block, unknown, np.flatnonzero(kinds == _LONG))
        found_ids = gathered(self._ids, block.places & _BEGIN, block.places >> 32)
        if self.nbytes_next > self._limit:
            self._clear()
        return found_ids

    def _learn(self, block: _Block, unknown: Sequence[_Unknown], long: np.ndarray) -> None:
        """Encodes all that is unknown at once and puts it into the tables. The ids of long segments stand behind what
        is filled, for this block alone."""
        distinct = [_distinct(one.keys) for one in unknown]
        keys = [block.buffer[begin:end] for begin, end in block.bounds[long[:, np.newaxis] + (0, 1)].tolist()]
        recent = {key: self._recent[key] for key in keys if key in self._recent}
        fresh = {key: at for key, at in zip(keys, long.tolist(), strict=True) if key not in recent}
        new = np.concatenate([*(one.where[first] for one, (first, _) in zip(unknown, distinct, strict=True)),
                              np.fromiter(fresh.values(), np.int64, len(fresh))])  # fmt: skip
        if len(new):
            ids, id_ends = self._encode(block.buffer, block.bounds[new], block.bounds[new + 1])
            places = _places(self._filled, id_ends)
            at = 0
            for one, (first, group) in zip(unknown, distinct, strict=True):
                learned = places[at : at + len(first)]
                one.table.insert(one.keys[first], learned)
                block.places[one.where] = learned[group]
                at += len(first)
            ends = [0, *id_ends.tolist()]
            recent |= {key: ids[ends[at + n] : ends[at + n + 1]].copy() for n, key in enumerate(fresh)}
            self._append(ids[: ends[at]])
        if keys:
            self._lay(block, long, [recent[key] for key in keys])
            self._remember(recent)

    def _lay(self, block: _Block, long: np.ndarray, found: Sequence[np.ndarray]) -> None:
        """Puts the ids of long segments behind what is filled."""
        block.places[long] = _places(self._filled, np.cumsum(list(map(len, found)), dtype=np.int64))
        filled = self._filled
        self._append(np.concatenate(found))
        self._filled = filled

    def _remember(self, found: Mapping[bytes, np.ndarray]) -> None:
        """Long segments as the last ones used."""
        for key, ids in found.items():
            if len(key) <= _LONGEST_KEPT:
                self._recent.pop(key, None)
                self._recent[key] = ids
        for key in list(islice(self._recent, max(0, len(self._recent) - _RECENT))):
            del self._recent[key]

    def _append(self, ids: np.ndarray) -> None:
        end = self._filled + len(ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(end, self._dtype)])
        self._ids[self._filled : end] = ids
        self._filled = end

    def _clear(self) -> None:
        self._tables, self._characters = [Table(width) for width in _WIDTHS], None
        self._recent: dict[bytes, np.ndarray] = {}
        self._ids, self._filled = np.empty(0, self._dtype), 0


def _keys(buffer: bytes, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """The keys of segments, [n, width]."""
    cells = np.ndarray(len(buffer) - 8 * width + 1, f"V{8 * width}", buffer, strides=(1,))  # from each byte on
    keys = cells[starts].view("<u8").reshape(-1, width)
    keys &= _MASKS[width].take(lengths, axis=0)
    keys[:, -1] |= lengths.astype("<u8") << np.uint64(56)
    return keys


def _places(begin: int, ends: np.ndarray) -> np.ndarray:
    """Where ids begin and how many they are, in one number each. ends: of those that stand from `begin` on."""
    begins = np.concatenate(([0], ends[:-1]))
    return (begin + begins) | (ends - begins) << 32


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One index for each distinct key, and for each key which of those has the same one."""
    order = np.lexsort(keys.T)
    ordered = keys[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(new) - 1
    return order[new], group


def gathered(source: np.ndarray, offset: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """source[offset[k] : offset[k] + count[k]] of every k one after another, and where each ends."""
    ends = np.cumsum(count)
    index = np.repeat(offset - (ends - count), count)
    index += np.arange(len(index))
    return source.take(index), ends


def flat_ids(ids: Iterable[Ids], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one array, and where each ends in it."""
    lists = list(ids)
    ends = np.cumsum(list(map(len, lists)), dtype=np.int64)
    return np.fromiter(chain.from_iterable(lists), dtype, int(ends[-1]) if lists else 0), ends


def substrings(buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The segments as text."""
    spans = zip(starts.tolist(), ends.tolist(), strict=True)
    return [buffer[begin:end].decode("utf-8") for begin, end in spans]
