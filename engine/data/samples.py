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
_BLOCK = 1024  # samples whose order is computed at once: 0.3 ms
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
        self._positions = InBlocks(self.starts)

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

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1, int64 [count, seq_len + 1]. Raises UserError when the corpus has changed
        since it was opened, or holds a token id that is outside the vocabulary."""
        starts, lengths = self._pieces(start, count)
        tokens = self.corpus.read(starts, lengths)
        self.corpus.check_unchanged()  # after reading, so that nothing comes through that was written meanwhile
        if self.vocab_size is not None or self.corpus.dtype.kind == "i":
            check_ids(tokens, self.vocab_size, self.corpus.prefix)  # before widening: a quarter of the bytes
        return tokens.astype(np.int64).reshape(count, self.seq_len + 1)

    def begins(self, start: int, count: int) -> np.ndarray:
        """Which of those tokens begin a document, bool [count, seq_len + 1]. Raises UserError when the index has
        changed or contradicts itself."""
        self.corpus.check_unchanged()  # before: else what was cut is told as damaged
        return self.corpus.begins(*self._pieces(start, count)).reshape(count, self.seq_len + 1)

    def _pieces(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the corpus the samples lie, one after another: starts and lengths in tokens, int64 [pieces]. A
        sample is one piece, or two where it passes the end of the ring."""
        begin = self.start + self._positions(start, count)
        over = np.maximum(begin + self.seq_len + 1 - self.stop, 0)
        starts, lengths = np.empty((count, 2), np.int64), np.empty((count, 2), np.int64)
        starts[:, 0], starts[:, 1] = begin, self.start
        lengths[:, 0], lengths[:, 1] = self.seq_len + 1 - over, over
        return starts[lengths > 0], lengths[lengths > 0]


class BlendSamples:
    """Several corpora mixed by weight; `epoch_size` and `tokens` are their sums."""

    def __init__(self, corpora: list[CorpusSamples], blend: Blend) -> None:
        self.corpora, self.blend = corpora, blend
        self.epoch_size = sum(corpus.epoch_size for corpus in corpora)
        self.tokens = sum(corpus.tokens for corpus in corpora)
        self._located = InBlocks(lambda ks: np.stack(blend.locate(ks), axis=-1))

    def rows(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1, int64 [count, seq_len + 1]."""
        return self._gather(start, count, CorpusSamples.rows, np.int64)

    def begins(self, start: int, count: int) -> np.ndarray:
        """Which of those tokens begin a document, bool [count, seq_len + 1]."""
        return self._gather(start, count, CorpusSamples.begins, bool)

    def _gather(self, start: int, count: int, read: Callable[[CorpusSamples, int, int], np.ndarray],
                dtype: type) -> np.ndarray:
        """What `read` gives for the samples, each from its own corpus, where their numbers follow one another."""
        source, index = self._located(start, count).T
        out: np.ndarray = np.empty((count, self.corpora[0].seq_len + 1), dtype)
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            out[mine] = read(self.corpora[number], int(index[mine[0]]), len(mine))
        return out


class InBlocks:
    """An array function of sample numbers, [n] -> [n, ..], asked for runs of them. It is computed for a whole aligned
    block of numbers, and the last block is kept: few samples a step cost no more each than many."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self._function = function
        self._last: tuple[int, np.ndarray] | None = None

    def __call__(self, start: int, count: int) -> np.ndarray:
        """The values for start .. start + count - 1."""
        if start < 0 or count < 0:
            raise ValueError(f"samples {start} and {count} on: neither may be negative")
        first, last = start // _BLOCK, max(start, start + count - 1) // _BLOCK
        values = [self._block(number) for number in range(first, last + 1)]
        return (values[0] if first == last else np.concatenate(values))[start - first * _BLOCK :][:count]

    def _block(self, number: int) -> np.ndarray:
        kept = self._last  # one reference, read once: another thread may replace it
        if kept is None or kept[0] != number:
            kept = number, self._function(np.arange(number * _BLOCK, (number + 1) * _BLOCK, dtype=np.int64))
            self._last = kept
        return kept[1]


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


def permute_inverse(position: np.ndarray, size: int, key: int) -> np.ndarray:
    """The index that `permute` sends to each position, int64 [n] -> int64 [n]."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(key + round_)) for round_ in reversed(range(_ROUNDS))]
    result = _feistel_back(np.asarray(position).astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel_back(result[outside], half, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel_back(value: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right ^ (_mix_array(left + key) & mask), left
    return (left << shift) | right


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
