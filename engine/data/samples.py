"""Data order as a function: sample k of a run depends on (seed, corpus, k) alone.

A part of a corpus (train or valid) is a contiguous range of the token stream, T tokens. For samples of seq_len = L an
epoch has N = T // L of them, each L + 1 tokens, stride L, so that every label position is met once. Epoch e starts at
an offset in [0, L) drawn from (seed, e): boundaries move from epoch to epoch. The range is read as a ring (the sample
that passes the end goes on at the start, one more document boundary), so that N is the same for every offset and no
token is lost at the ends. The order within an epoch is a bijection computed by a Feistel network; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from engine.data.blend import Blend, parse_spec
from engine.data.indexed import IndexedDataset, check_ids
from engine.errors import UserError

_ROUNDS = 8
_PARTS = {"train": 1, "valid": 2}
_MASK = (1 << 64) - 1


class Samples(Protocol):
    """An endless sequence of samples over one corpus or a blend of several."""

    epoch_size: int
    tokens: int

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1, int64 [count, seq_len + 1]; epochs roll on."""
        ...

    def begins(self, start: int, count: int) -> np.ndarray:
        """Which of those tokens begin a document, bool [count, seq_len + 1]."""
        ...


def open_samples(
    spec: str,
    *,
    seq_len: int,
    seed: int,
    part: str = "train",
    valid_fraction: float = 0.0,
    vocab_size: int | None = None,
) -> Samples:
    """Opens "PREFIX" or a blend "P1:0.7,P2:0.3".

    part: "train" or "valid"; the last `valid_fraction` of the documents (at least one when it is above 0) are valid.
    vocab_size: when given, every row read is checked against it. Raises UserError for a spec, a file or a part that
    cannot give one sample."""
    if seq_len < 1:
        raise UserError(f"seq-len {seq_len} must be at least 1")
    if part not in _PARTS:
        raise UserError(f'part "{part}" is neither "train" nor "valid"')
    if not 0.0 <= valid_fraction < 1.0:
        raise UserError(f"valid fraction {valid_fraction} must be at least 0 and below 1")
    named = parse_spec(spec)
    opened = [
        CorpusSamples(IndexedDataset(prefix), seq_len, seed, part, valid_fraction, vocab_size) for prefix, _ in named
    ]
    return opened[0] if len(opened) == 1 else BlendSamples(opened, Blend([weight for _, weight in named]))


class CorpusSamples:
    """The samples of one part of one corpus."""

    def __init__(
        self,
        corpus: IndexedDataset,
        seq_len: int,
        seed: int,
        part: str = "train",
        valid_fraction: float = 0.0,
        vocab_size: int | None = None,
    ) -> None:
        """Raises UserError when the part is too short for one sample."""
        self.corpus, self.seq_len, self.vocab_size = corpus, seq_len, vocab_size
        start, self.stop = part_range(corpus, part, valid_fraction)
        self.start, self.tokens = start, self.stop - start
        self.epoch_size = self.tokens // seq_len
        if self.tokens < seq_len + 1:
            raise UserError(
                f"the {part} part of {corpus.prefix} has {max(self.tokens, 0)} tokens of the corpus' "
                f"{len(corpus.tokens)}, fewer than the {seq_len + 1} of one sample; use a seq-len of at most "
                f"{max(self.tokens - 1, 0)}, another split or a larger corpus"
            )
        self._key = mix(mix(seed & _MASK) + _PARTS[part])

    def offset(self, epoch: int) -> int:
        """Where epoch `epoch` starts, in [0, seq_len)."""
        return mix(self._key + 2 * epoch) % self.seq_len

    def starts(self, ks: np.ndarray) -> np.ndarray:
        """The position in the part's ring where each of the samples ks [n] begins, int64 [n]."""
        epochs, index = np.divmod(np.asarray(ks, dtype=np.int64), self.epoch_size)
        result = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = permute(index[here], self.epoch_size, mix(self._key + 2 * int(epoch) + 1))
            result[here] = self.offset(int(epoch)) + order * self.seq_len
        return result % self.tokens

    def at(self, ks: np.ndarray) -> np.ndarray:
        """The samples ks [n], int64 [n, seq_len + 1]."""
        out = np.empty((len(ks), self.seq_len + 1), np.int64)
        for row, position in zip(out, self.starts(ks), strict=True):
            begin = self.start + int(position)
            head = min(self.seq_len + 1, self.stop - begin)
            row[:head] = self.corpus.tokens[begin : begin + head]
            row[head:] = self.corpus.tokens[self.start : self.start + self.seq_len + 1 - head]
        if self.vocab_size is not None or self.corpus.dtype.kind == "i":
            check_ids(out, self.vocab_size, self.corpus.prefix)
        return out

    def begins_at(self, ks: np.ndarray) -> np.ndarray:
        """Which tokens of the samples ks [n] begin a document, bool [n, seq_len + 1]."""
        out = np.zeros((len(ks), self.seq_len + 1), bool)
        for row, position in zip(out, self.starts(ks), strict=True):
            begin = self.start + int(position)
            head = min(self.seq_len + 1, self.stop - begin)
            row[self.corpus.documents_between(begin, begin + head) - begin] = True
            more = self.seq_len + 1 - head
            row[head + self.corpus.documents_between(self.start, self.start + more) - self.start] = True
        return out

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1, int64 [count, seq_len + 1]."""
        return self.at(_span(start, count))

    def begins(self, start: int, count: int) -> np.ndarray:
        """Which of those tokens begin a document, bool [count, seq_len + 1]."""
        return self.begins_at(_span(start, count))


class BlendSamples:
    """Several corpora mixed by weight; `epoch_size` and `tokens` are their sums."""

    def __init__(self, corpora: list[CorpusSamples], blend: Blend) -> None:
        self.corpora, self.blend = corpora, blend
        self.epoch_size = sum(corpus.epoch_size for corpus in corpora)
        self.tokens = sum(corpus.tokens for corpus in corpora)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1, int64 [count, seq_len + 1]."""
        return self._gather(start, count, CorpusSamples.at, np.int64)

    def begins(self, start: int, count: int) -> np.ndarray:
        """Which of those tokens begin a document, bool [count, seq_len + 1]."""
        return self._gather(start, count, CorpusSamples.begins_at, bool)

    def _gather(self, start: int, count: int, read: Callable[[CorpusSamples, np.ndarray], np.ndarray],
                dtype: type) -> np.ndarray:
        """What `read` gives for the samples, each from its own corpus."""
        source, index = self.blend.locate(_span(start, count))
        out: np.ndarray = np.empty((count, self.corpora[0].seq_len + 1), dtype)
        for number, corpus in enumerate(self.corpora):
            mine = source == number
            if mine.any():
                out[mine] = read(corpus, index[mine])
        return out


def part_range(corpus: IndexedDataset, part: str, valid_fraction: float) -> tuple[int, int]:
    """The tokens [start, stop) of a part: whole documents, the last ones being the valid part."""
    held_back = round(corpus.documents * valid_fraction)
    if valid_fraction > 0.0:
        held_back = min(max(held_back, 1), corpus.documents)
    border = corpus.token_start(corpus.documents - held_back)
    return (0, border) if part == "train" else (border, len(corpus.tokens))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A bijection of [0, size) chosen by key, applied to index, int64 [n] -> int64 [n].

    A balanced Feistel network on the next power of four; a value that lands outside is sent through again until it is
    inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): fewer than four times on
    average."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(key + round_)) for round_ in range(_ROUNDS)]
    result = _feistel(np.asarray(index).astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], half, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(value: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_mix_array(right + key) & mask)
    return (left << shift) | right


def mix(value: int) -> int:
    """A 64-bit number whose every bit depends on every bit of value (splitmix64; Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _span(start: int, count: int) -> np.ndarray:
    if start < 0 or count < 0:
        raise ValueError(f"rows({start}, {count}): neither may be negative")
    return np.arange(start, start + count, dtype=np.int64)
