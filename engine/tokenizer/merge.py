"""The merge loop for many pieces at once, in numpy: to the id what ByteVocabulary.encode gives for each.

Each round joins one pair in every piece: that of the lowest rank, the leftmost of several. Pieces that some pair was
joined in are one part shorter, as those are that come in next: all pieces of a round have the same number of parts, and
lie in one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from engine.tokenizer.bpe import ByteVocabulary
from engine.tokenizer.segments import Table

LONGEST = 32
"""Bytes of a piece. Longer ones are merged by ByteVocabulary.encode, which takes n log n steps where this takes n²."""
_FEW = 50  # pieces; fewer are merged one by one, as a round takes its time for one piece too
_NEVER = np.iinfo(np.int32).max  # the rank of what is not joined
_NOTHING = 256  # a part that stands before and after each piece; 0 to 255 are bytes
_Done = tuple[np.ndarray, np.ndarray]  # which pieces have been merged [n], their ids [n, parts]


class BatchMerge:
    """The ids of pieces by a vocabulary."""

    def __init__(self, vocabulary: ByteVocabulary, dtype: np.dtype[Any]) -> None:
        """dtype: of the ids."""
        self._vocabulary, self._dtype = vocabulary, dtype
        number = {bytes([byte]): byte for byte in range(256)} | {b"": _NOTHING}
        joins = (
            (*(number.setdefault(part, len(number)) for part in (one, two, one + two)), rank)
            for one, two, rank in vocabulary.pairs(LONGEST)
        )
        left, right, made, ranks = np.fromiter(chain.from_iterable(joins), np.int64).reshape(-1, 4).T
        self._ids = np.array([vocabulary.ids.get(part, -1) for part in number], np.int64)
        # Ranks are numbered anew, without gaps. Pairs have the same one only where they make the same piece.
        _, ranks = np.unique(ranks, return_inverse=True)
        self._made = np.zeros(len(ranks), np.int32)
        self._made[ranks] = made
        self._ranks = Table(1)
        self._ranks.insert(_keys(left, right), ranks)
        self._of_bytes = self._rank(*np.divmod(np.arange((_NOTHING + 1) ** 2), _NOTHING + 1))

    def __call__(self, buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See segments.Spans. Raises KeyError for a byte that the vocabulary lacks."""
        which = np.arange(len(starts))
        done = []
        if self._vocabulary.whole_first:
            spans = zip(starts.tolist(), ends.tolist(), strict=True)
            whole = np.array([self._vocabulary.ids.get(buffer[begin:end], -1) for begin, end in spans], np.int64)
            which = np.flatnonzero(whole < 0)
            done.append((np.flatnonzero(whole >= 0), whole[whole >= 0, np.newaxis]))
        done += self._merged(buffer, starts, ends, which)
        return self._flat(done, len(starts))

    def not_made(self) -> list[bytes]:
        """The pieces of the vocabulary that merging does not make from their bytes."""
        pieces = list(self._vocabulary.ids)
        ends = np.cumsum(list(map(len, pieces)), dtype=np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        done = self._merged(b"".join(pieces), starts, ends, np.arange(len(pieces)))
        return [pieces[at] for which, ids in done if ids.shape[1] > 1 for at in which.tolist()]

    def _merged(self, buffer: bytes, starts: np.ndarray, ends: np.ndarray, which: np.ndarray) -> Iterator[_Done]:
        lengths = ends - starts
        short = which[lengths[which] <= LONGEST]
        if len(short) < _FEW:
            short = which[:0]
        yield from self._rounds(np.frombuffer(buffer, np.uint8), starts, lengths, short)
        for one in np.setdiff1d(which, short).tolist():
            yield np.array([one]), self._apart(buffer[starts[one] : ends[one]])

    def _apart(self, piece: bytes) -> np.ndarray:
        """The ids [1, n] of a piece that is merged alone."""
        ids = self._vocabulary.ids
        return np.array([[ids.get(part, -1) for part in self._vocabulary.merge(piece)]], np.int64)

    def _rounds(self, raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray, which: np.ndarray) -> Iterator[_Done]:
        """The pieces `which`, those with most parts first. In a round each has `size` parts, and _NOTHING around."""
        order = which[np.argsort(lengths[which], kind="stable")]
        first = np.searchsorted(lengths[order], np.arange(LONGEST + 2))
        waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for size in range(LONGEST, 0, -1):
            new = order[first[size] : first[size + 1]]
            if len(new):
                waiting.append((new, *self._begun(raw, starts[new], size)))
            if not waiting:
                continue
            which, parts, ranks = map(np.concatenate, zip(*waiting, strict=True))
            at = ranks.argmin(axis=1)
            lowest = ranks[np.arange(len(at)), at]
            live = lowest != _NEVER
            yield which[~live], self._ids[parts[~live, 1:-1]]
            waiting = []
            if live.any():
                joined = self._joined(parts[live], ranks[live], at[live], self._made[lowest[live]])
                waiting.append((which[live], *joined))

    def _begun(self, raw: np.ndarray, starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes as parts [n, size + 2], and the ranks of every two neighbours [n, size + 1]."""
        parts = np.full((len(starts), size + 2), _NOTHING, np.int32)
        parts[:, 1:-1] = raw[starts[:, np.newaxis] + np.arange(size)]
        return parts, self._of_bytes[parts[:, :-1] * (_NOTHING + 1) + parts[:, 1:]]

    def _joined(
        self, parts: np.ndarray, ranks: np.ndarray, at: np.ndarray, made: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """In each row the parts `at` and the one after it become the part `made`."""
        n, width = parts.shape
        rows = np.arange(n)
        keep = np.ones(parts.shape, bool)
        keep[rows, at + 1] = False
        parts = parts[keep]  # now flat, of width - 1
        keep = np.ones(ranks.shape, bool)
        keep[rows, at] = False
        ranks = ranks[keep]  # now flat, of width - 2
        spot = rows * (width - 1) + at
        parts[spot] = made
        found = self._rank(parts[np.concatenate([spot - 1, spot])], parts[np.concatenate([spot, spot + 1])])
        spot -= rows
        ranks[spot - 1], ranks[spot] = found[:n], found[n:]
        return parts.reshape(n, -1), ranks.reshape(n, -1)

    def _rank(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        found = self._ranks.find(_keys(left, right))
        return np.where(found < 0, _NEVER, found).astype(np.int32)

    def _flat(self, done: list[_Done], pieces: int) -> tuple[np.ndarray, np.ndarray]:
        count = np.zeros(pieces, np.int64)
        for which, ids in done:
            count[which] = ids.shape[1]
        ends = np.cumsum(count)
        flat = np.empty(ends[-1] if pieces else 0, np.int64)
        for which, ids in done:
            flat[(ends[which] - ids.shape[1])[:, np.newaxis] + np.arange(ids.shape[1])] = ids
        if len(flat) and flat.min() < 0:
            raise KeyError("the vocabulary lacks a byte of the text")
        return flat.astype(self._dtype), ends


def _keys(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pairs of parts as keys of a Table, which are never 0."""
    return (left.astype("<u8") << np.uint64(32) | (right + 1).astype("<u8"))[:, np.newaxis]
