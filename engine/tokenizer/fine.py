"""Texts to ids, cut at every safe boundary: the quick way for scripts without spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from engine.tokenizer.memo import Ids, Memo, packed
from engine.tokenizer.safe_pairs import CODE_POINTS, SafePairs

_BLOCK = 1 << 18  # characters encoded at a time, so that the arrays stay small


class FineEncoder:
    """Most segments of Chinese are one character: those go through a table, in numpy, and only longer ones through a
    memo. A vocabulary without safe pairs is cut by its pre-tokenizer alone."""

    def __init__(
        self,
        pairs: SafePairs | None,
        encode: Callable[[list[str]], Iterable[Ids]],
        dtype: np.dtype[Any],
        *,
        pieces: Callable[[str], list[str]] | None = None,
        windows: Callable[[str], Iterator[str]],
    ) -> None:
        """encode: segments to ids, exact whatever stands around them. pieces: the pre-tokenizer, if there is one: cuts
        that must be made. windows: parts of a long text that may be encoded apart."""
        self._pairs, self._encode, self._dtype, self._pieces, self._windows = pairs, encode, dtype, pieces, windows
        self._memo = Memo(lambda segments: packed(list(encode(segments)), dtype))
        self._ids = np.empty(0, dtype)  # of all characters seen alone, one after another
        self._start = np.full(CODE_POINTS, -1, np.int32)  # where in self._ids a character's begin; -1: not seen yet
        self._count = np.zeros(CODE_POINTS, np.uint8)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as bytes. Raises UnicodeEncodeError for a lone surrogate."""
        answer: list[list[bytes]] = [[] for _ in texts]
        held: list[tuple[int, str]] = []
        size = 0
        for number, text in enumerate(texts):
            for window in self._windows(text):
                if size + len(window) > _BLOCK:
                    self._flush(held, answer)
                    held, size = [], 0
                held.append((number, window))
                size += len(window)
        self._flush(held, answer)
        return [b"".join(parts) for parts in answer]

    def _flush(self, held: Sequence[tuple[int, str]], answer: list[list[bytes]]) -> None:
        for (number, _), ids in zip(held, self._block([part for _, part in held]), strict=True):
            answer[number].append(ids)

    def _block(self, parts: Sequence[str]) -> list[bytes]:
        """The ids of parts that are encoded apart, all of them at once."""
        text = "".join(parts)
        if not text:
            return [b""] * len(parts)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        part_ends = np.cumsum([len(part) for part in parts])
        cut = np.ones(len(codes), bool)
        cut[:-1] = False if self._pairs is None else self._pairs.safe(codes)
        cut[part_ends - 1] = True
        if self._pieces is not None:
            lengths = [length for part in parts for length in map(len, self._pieces(part))]
            cut[np.cumsum(lengths) - 1] = True
        ends = np.flatnonzero(cut) + 1
        ids, id_ends = self._ids_of(text, codes, ends)
        raw, item = ids.tobytes(), self._dtype.itemsize
        bounds = np.concatenate(([0], id_ends))[np.searchsorted(ends, part_ends, side="right")] * item
        return [raw[begin:end] for begin, end in pairwise([0, *bounds.tolist()])]

    def _ids_of(self, text: str, codes: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where segments end in the text -> all ids, and for each segment where its ids end."""
        starts = np.concatenate(([0], ends[:-1]))
        lone = codes.take(starts)
        many = np.flatnonzero(ends - starts > 1)
        self._learn(np.delete(lone, many))
        offset, count = self._start.take(lone).astype(np.int64), self._count.take(lone).astype(np.int64)
        source = self._ids
        if len(many):
            spans = zip(starts[many].tolist(), ends[many].tolist(), strict=True)
            found = [self._memo[text[begin:end]] for begin, end in spans]
            self._memo.fill()
            source = np.concatenate([source, np.frombuffer(b"".join(found), self._dtype)])
            count[many] = np.fromiter(map(len, found), np.int64, len(found)) // self._dtype.itemsize
            offset[many] = len(self._ids) + np.cumsum(count[many]) - count[many]
        id_ends = np.cumsum(count)
        gather = np.repeat(offset - (id_ends - count), count)
        gather += np.arange(len(gather))
        return source.take(gather), id_ends

    def _learn(self, codes: np.ndarray) -> None:
        """Encodes the characters that are new."""
        new = np.unique(codes[self._start.take(codes) < 0])
        if len(new):
            ids = packed(list(self._encode([chr(code) for code in new.tolist()])), self._dtype)
            self._count[new] = [len(one) // self._dtype.itemsize for one in ids]
            self._start[new] = len(self._ids) + np.cumsum(self._count[new], dtype=np.int64) - self._count[new]
            self._ids = np.concatenate([self._ids, np.frombuffer(b"".join(ids), self._dtype)])
