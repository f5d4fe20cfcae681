"""What one dp rank reads in a step: all its micro-batches, tokens and labels. No broadcast, no hand-shake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Batch:
    """tokens and labels [sequences, seq], int64; label i is the token after token i, or -100 where not supervised.

    begins [sequences, seq], bool: where a document begins, for attention that stays within documents; None where it
    does not.
    lengths [sequences], int64: how many tokens of each sequence come before its padding; None where none is padded.
    full: every token is supervised and none is padding, here and on all other dp ranks, so nobody need count them."""

    tokens: np.ndarray
    labels: np.ndarray
    begins: np.ndarray | None = None
    lengths: np.ndarray | None = None
    full: bool = False

    def own_lengths(self) -> np.ndarray:
        """Tokens of each sequence, padding left out, int64 [sequences]."""
        return np.full(len(self.tokens), self.tokens.shape[1], np.int64) if self.lengths is None else self.lengths

    def cumulative(self, micro_batch: int, padded: int) -> list[np.ndarray] | None:
        """For each micro-batch the cumulative lengths of its documents over its flattened tokens, int32 [documents +
        1], when every sequence is filled up to `padded` tokens; a sequence begins a document."""
        if self.begins is None:
            return None
        begins = np.pad(self.begins, ((0, 0), (0, padded - self.begins.shape[1])))
        begins[:, 0] = True
        parts = [begins[i : i + micro_batch].reshape(-1) for i in range(0, len(begins), micro_batch)]
        return [np.append(np.flatnonzero(part), len(part)).astype(np.int32) for part in parts]


def rows_of(batch: Batch, rows: int) -> list[Batch]:
    """The batch in parts of at most `rows` sequences."""
    arrays: dict[str, Any] = {name: array for name, array in vars(batch).items() if isinstance(array, np.ndarray)}
    return [Batch(**{name: array[i : i + rows] for name, array in arrays.items()})
            for i in range(0, len(batch.tokens), rows)]


class Batches(Protocol):
    """A pure function of the step: the same for every layout, worker and restart."""

    def step(self, step: int) -> Batch:
        """This rank's part of step `step` (from 0): global_batch / dp sequences, one length for all."""
        ...


class Rows(Protocol):
    """Samples by number, as `engine.data.open_samples` gives them."""

    def rows(self, start: int, count: int) -> np.ndarray:
        """[count, seq_len + 1] tokens of samples start .. start + count - 1."""
        ...

    def begins(self, start: int, count: int) -> np.ndarray:
        """[count, seq_len + 1], bool: which of those tokens begin a document."""
        ...


@dataclass(frozen=True)
class PretrainBatches:
    """Samples k = origin + step * global_batch ... of a corpus; rank r of dp takes the r-th equal part of them.

    `origin` is 0 unless a run was resumed with another global batch: then it makes up for the steps before.
    `documents`: say where documents begin.
    """

    samples: Rows
    global_batch: int
    dp_rank: int = 0
    dp: int = 1
    origin: int = 0
    documents: bool = False

    def step(self, step: int) -> Batch:
        share = self.global_batch // self.dp
        return read(self.samples, self.origin + step * self.global_batch + self.dp_rank * share, share, self.documents)


def read(samples: Rows, start: int, count: int, documents: bool) -> Batch:
    """Samples start .. start + count - 1 as a batch; with `documents` it says where documents begin. The arrays are
    contiguous: a copy here, in the thread that reads ahead, saves one in the step."""
    rows = samples.rows(start, count)
    begins = samples.begins(start, count)[:, :-1] if documents else None
    return Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), begins, full=True)


def share_of(batch: Batch, dp_rank: int, dp: int) -> Batch:
    """One dp rank's equal part of a batch; where it does not divide, ignored rows fill it up."""
    more = -len(batch.tokens) % dp
    tokens = np.pad(batch.tokens, ((0, more), (0, 0)))
    labels = np.pad(batch.labels, ((0, more), (0, 0)), constant_values=-100)
    begins = None if batch.begins is None else np.pad(batch.begins, ((0, more), (0, 0)))
    lengths = np.pad(batch.own_lengths(), (0, more))
    rows = slice(dp_rank * len(tokens) // dp, (dp_rank + 1) * len(tokens) // dp)
    return Batch(tokens[rows], labels[rows], None if begins is None else begins[rows], lengths[rows])
