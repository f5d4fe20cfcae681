"""What one dp rank reads in a step: all its micro-batches, tokens and labels. No broadcast, no hand-shake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Batch:
    """tokens and labels [sequences, seq], int64; label i is the token after token i, or -100 where not supervised."""

    tokens: np.ndarray
    labels: np.ndarray


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


@dataclass(frozen=True)
class PretrainBatches:
    """Samples k = origin + step * global_batch ... of a corpus; rank r of dp takes the r-th equal part of them.

    `origin` is 0 unless a run was resumed with another global batch: then it makes up for the steps before.
    """

    samples: Rows
    global_batch: int
    dp_rank: int = 0
    dp: int = 1
    origin: int = 0

    def step(self, step: int) -> Batch:
        share = self.global_batch // self.dp
        rows = self.samples.rows(self.origin + step * self.global_batch + self.dp_rank * share, share)
        return Batch(rows[:, :-1], rows[:, 1:])


def share_of(batch: Batch, dp_rank: int, dp: int) -> Batch:
    """One dp rank's equal part of a batch; where it does not divide, ignored rows fill it up."""
    more = -len(batch.tokens) % dp
    tokens = np.pad(batch.tokens, ((0, more), (0, 0)))
    labels = np.pad(batch.labels, ((0, more), (0, 0)), constant_values=-100)
    rows = slice(dp_rank * len(tokens) // dp, (dp_rank + 1) * len(tokens) // dp)
    return Batch(tokens[rows], labels[rows])
