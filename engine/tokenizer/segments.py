"""Segments of text and their ids, remembered in numpy: most of a corpus is the same words again.

A segment of up to 63 bytes is a key of two, four or eight 64-bit numbers: its bytes, and in the last byte its length.
All segments of a block of text are looked up at once in a hash table of such keys, compared in full, so that no two
are ever mistaken for each other; and all ids are gathered at once. There is no Python work for each word or token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from engine.tokenizer.safe_pairs import CODE_POINTS

LIMIT_BYTES = 64 << 20
"""Memory that one memo may take. It is emptied when full: what is common comes back at once."""
PADDING = bytes(64)
"""Has to follow the text in a buffer, as keys are read in whole."""

Ids = Sequence[int]
Spans = Callable[[bytes, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A buffer of UTF-8 (with PADDING), and where segments start and end in it [n] -> the ids of all of them one after
another, and for each segment where its ids end [n]."""

_WIDTHS = (2, 4, 8)  # 64-bit numbers in a key; a segment must be shorter than its key by the byte for its length
_LONG = len(_WIDTHS)
_KINDS = np.repeat(np.arange(_LONG + 1, dtype=np.uint8), (16, 16, 32, 1))  # which of them has a length's keys
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], "<u8")  # keeps the first 0 to 8 bytes
_FIRST_SLOTS = 1 << 12
_LONGEST_KEPT, _RECENT = 1 << 10, 1 << 11  # bytes, and segments: most are rulers, as "-----+", again and again
_LARGE = 1 << 20  # numbers in keys: up to there a table grows fourfold, which saves time, then twofold, for memory


class _Characters:
    """Code points [1, n] -> where their ids begin (-1: not known) and how many they are, by a plain array."""

    def __init__(self) -> None:
        self.start, self.count = np.full(CODE_POINTS, -1, np.int32), np.zeros(CODE_POINTS, np.int32)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The slot of each key, which is there."""
        return keys[0]

    def insert(self, keys: np.ndarray, start: np.ndarray, count: np.ndarray) -> None:
        """See Table.insert."""
        self.start[keys[0]], self.count[keys[0]] = start, count


class Table:
    """Keys [width, n] -> where their ids begin and how many they are. Open addressing, at most half full, going on by
    1, 2, 3.. slots. The multipliers are odd and random (Dietzfelbinger et al. 1997), so that no text can be made to
    collide."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._factors = [np.uint64(secrets.randbits(64) | 1) for _ in range(width + 1)]
        self._used = 0
        self._resize(_FIRST_SLOTS)

    def keys(self, words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The keys of segments. words: the 64-bit number that begins at each byte of the buffer."""
        columns = np.empty((self._width, len(starts)), "<u8")
        for place in range(self._width):
            columns[place] = words[starts + 8 * place]
            columns[place] &= _MASKS.take(lengths - 8 * place, mode="clip")
        columns[-1] |= lengths.astype("<u8") << np.uint64(56)
        return columns

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The slot of each key; -1 where it is not there."""
        slot = self._home(keys)
        left = np.flatnonzero(~self._holds(slot, keys))
        step = 0
        while len(left):
            step += 1
            at = slot[left]
            taken = self._keys[-1].take(at) != 0
            slot[left[~taken]] = -1
            left, at = left[taken], (at[taken] + step) & (len(self.start) - 1)
            slot[left] = at
            left = left[~self._holds(at, keys[:, left])]
        return slot

    def insert(self, keys: np.ndarray, start: np.ndarray, count: np.ndarray) -> None:
        """Adds keys that are not there, each once. Slots found before are good no more."""
        self._used += keys.shape[1]
        if 2 * self._used > len(self.start):
            old, begin, size = self._keys, self.start, self.count
            taken = np.flatnonzero(old[-1])
            slots = 1 << int(2 * self._used - 1).bit_length()
            self._resize(slots if slots * self._width > _LARGE else 2 * slots)
            self._place(old[:, taken], begin[taken], size[taken])
        self._place(keys, start, count)

    def _place(self, keys: np.ndarray, start: np.ndarray, count: np.ndarray) -> None:
        slot, left, step = self._home(keys), np.arange(keys.shape[1]), 0
        while len(left):
            free = left[self._keys[-1].take(slot[left]) == 0]
            at = slot[free]
            self.start[at] = free  # of several for one slot, the last written takes it
            won = self.start[at] == free
            at, placed = at[won], free[won]
            self._keys[:, at], self.start[at], self.count[at] = keys[:, placed], start[placed], count[placed]
            slot[placed] = -1
            left = left[slot[left] >= 0]
            step += 1
            slot[left] = (slot[left] + step) & (len(self.start) - 1)

    def _holds(self, slot: np.ndarray, keys: np.ndarray) -> np.ndarray:
        same = self._keys[0].take(slot) == keys[0]
        for mine, given in zip(self._keys[1:], keys[1:], strict=True):
            same &= mine.take(slot) == given
        return same

    def _home(self, keys: np.ndarray) -> np.ndarray:
        mixed = keys[0] * self._factors[0]
        for column, factor in zip(keys[1:], self._factors[1:-1], strict=True):
            mixed ^= column * factor
        mixed ^= mixed >> np.uint64(29)
        mixed *= self._factors[-1]
        return (mixed >> np.uint64(64 - (len(self.start) - 1).bit_length())).astype(np.int64)

    def _resize(self, slots: int) -> None:
        self._keys = np.zeros((self._width, slots), "<u8")  # the last number of a key is never 0
        self.start, self.count = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        self.nbytes = self._keys.nbytes + self.start.nbytes + self.count.nbytes


@dataclass(frozen=True)
class _Block:
    """Segments of a buffer, and what is known of each."""

    buffer: bytes
    bounds: np.ndarray  # where each begins, and where the last ends [n + 1]
    offset: np.ndarray  # where its ids begin [n]
    count: np.ndarray  # how many they are [n]


@dataclass(frozen=True)
class _Unknown:
    """Segments that a table did not hold."""

    table: Table | _Characters
    keys: np.ndarray  # [width, n]
    where: np.ndarray  # which of the block's segments they are [n]


class SegmentMemo:
    """The ids of segments. Those of up to 63 bytes are remembered, of longer ones the last few."""

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

    def ids_of(
        self, buffer: bytes, bounds: np.ndarray, codes: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Segments from each of `bounds` to the next one -> what Spans give. codes: for segments of one character its
        code point, else -1; left out where those need no short cut."""
        lengths = np.diff(bounds)
        kinds = _KINDS.take(lengths, mode="clip")
        unknown = []
        if codes is None:
            block = _Block(buffer, bounds, np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64))
        else:
            self._characters = self._characters or _Characters()
            start, count = self._characters.start.take(codes), self._characters.count.take(codes)
            block = _Block(buffer, bounds, start.astype(np.int64), count.astype(np.int64))
            lone = codes >= 0
            kinds[lone] = 255
            missing = np.flatnonzero(lone & (start < 0))
            if len(missing):
                unknown.append(_Unknown(self._characters, codes[np.newaxis, missing], missing))
        words = np.ndarray(len(buffer) - 7, "<u8", buffer, strides=(1,))
        for kind, table in enumerate(self._tables):
            which = np.flatnonzero(kinds == kind)
            if len(which):
                keys = table.keys(words, bounds[which], lengths[which])
                unknown += self._look_up(block, table, keys, which)
        self._learn(block, unknown, np.flatnonzero(kinds == _LONG))
        found = gathered(self._ids, block.offset, block.count)
        if sum(table.nbytes for table in self._tables) + self._ids.nbytes > self._limit:
            self._clear()
        return found

    def _look_up(self, block: _Block, table: Table, keys: np.ndarray, which: np.ndarray) -> list[_Unknown]:
        slot = table.find(keys)
        block.offset[which], block.count[which] = table.start.take(slot), table.count.take(slot)
        missing = np.flatnonzero(slot < 0)
        return [_Unknown(table, keys[:, missing], which[missing])] if len(missing) else []

    def _learn(self, block: _Block, unknown: Sequence[_Unknown], long: np.ndarray) -> None:
        """Encodes all that is unknown at once and puts it into the tables. The ids of long segments stand behind what
        is filled, for this block alone."""
        distinct = [_distinct(one.keys) for one in unknown]
        keys = [block.buffer[begin:end] for begin, end in block.bounds[long[:, np.newaxis] + (0, 1)].tolist()]
        recent = {key: self._recent[key] for key in keys if key in self._recent}
        fresh = {key: at for key, at in zip(keys, long.tolist(), strict=True) if key not in recent}
        new = np.concatenate([*(one.where[first] for one, first in zip(unknown, distinct, strict=True)),
                              np.fromiter(fresh.values(), np.int64, len(fresh))])  # fmt: skip
        if len(new):
            ids, id_ends = self._encode(block.buffer, block.bounds[new], block.bounds[new + 1])
            size = np.diff(id_ends, prepend=0)
            begin = self._filled + id_ends - size
            at = 0
            for one, first in zip(unknown, distinct, strict=True):
                end = at + len(first)
                one.table.insert(one.keys[:, first], begin[at:end], size[at:end])
                slot = one.table.find(one.keys)
                block.offset[one.where], block.count[one.where] = one.table.start[slot], one.table.count[slot]
                at = end
            spans = zip(fresh, (id_ends - size)[at:].tolist(), id_ends[at:].tolist(), strict=True)
            recent |= {key: ids[first:last].copy() for key, first, last in spans}
            self._append(ids[: int(id_ends[at - 1]) if at else 0])
        if keys:
            self._lay(block, long, [recent[key] for key in keys])
            self._remember(recent)

    def _lay(self, block: _Block, long: np.ndarray, found: Sequence[np.ndarray]) -> None:
        """Puts the ids of long segments behind what is filled."""
        count = np.fromiter(map(len, found), np.int64, len(found))
        block.count[long], block.offset[long] = count, self._filled + np.cumsum(count) - count
        self._append(np.concatenate(found))
        self._filled -= int(count.sum())

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


def _distinct(keys: np.ndarray) -> np.ndarray:
    """One index for each distinct key."""
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = (keys[:, order[1:]] != keys[:, order[:-1]]).any(axis=0)
    return order[new]


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
