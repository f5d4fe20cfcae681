"""The steps of a tuning run: encoded rows in an order that is a pure function of (seed, epoch), one row a sequence."""

from __future__ import annotations

import numpy as np

from engine.data.batches import Batch
from engine.data.samples import mix, permute
from engine.tune.encoded import Encoded

IGNORE = -100
"""Label of what is not learned."""

_CHAT = 0x63686174  # keeps the order of chat rows apart from a corpus' samples under the same seed
MULTIPLE = 8
"""A step's length is rounded up to a multiple of it."""


class ChatBatches:
    """The steps of a tuning run: rows in an order that is a pure function of (seed, epoch), one row a sequence.

    A step is as long as its longest row over all data-parallel ranks, rounded up, so every layout computes the same
    step. Padding is by length: it is never learned, whatever its id."""

    def __init__(self, rows: Encoded, *, global_batch: int, dp_rank: int = 0, dp: int = 1, seed: int = 0,
                 origin: int = 0) -> None:
        """rows: at least one; origin: samples before step 0, above 0 in a run resumed with another global batch."""
        self.rows, self.global_batch, self.dp_rank, self.dp, self.origin = rows, global_batch, dp_rank, dp, origin
        self._key = mix(mix(seed) ^ mix(_CHAT))

    @property
    def epoch_size(self) -> int:
        """Rows in an epoch."""
        return len(self.rows)

    def order(self, start: int, count: int) -> np.ndarray:
        """The rows of samples start .. start + count - 1 of the endless sequence of epochs, int64 [count]."""
        epochs, index = np.divmod(np.arange(start, start + count, dtype=np.int64), self.epoch_size)
        rows = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(index[here], self.epoch_size, mix(self._key + int(epoch)))
        return rows

    def step(self, step: int) -> Batch:
        """This rank's part of step `step` (from 0): tokens and labels [global_batch / dp, longest of the step]."""
        rows = self.order(self.origin + step * self.global_batch, self.global_batch)
        share = self.global_batch // self.dp
        longest = int((self.rows.starts[rows + 1] - self.rows.starts[rows]).max()) - 1
        return batch_of(self.rows, rows[self.dp_rank * share : (self.dp_rank + 1) * share], longest)


def head(rows: Encoded, count: int) -> Batch:
    """The first rows, at most `count`, as one batch: the same at every evaluation."""
    numbers = np.arange(min(count, len(rows)))
    return batch_of(rows, numbers, int(np.diff(rows.starts)[numbers].max()) - 1)


def batch_of(rows: Encoded, numbers: np.ndarray, longest: int) -> Batch:
    """The rows of these numbers [sequences], padded to `longest` tokens rounded up."""
    shape = (len(numbers), -(-longest // MULTIPLE) * MULTIPLE)
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    lengths = rows.starts[numbers + 1] - rows.starts[numbers] - 1
    for i, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        ids = rows.ids[rows.starts[number] : rows.starts[number + 1]]
        learned = rows.learned[rows.starts[number] + 1 : rows.starts[number + 1]]
        tokens[i, :length] = ids[:-1]
        labels[i, :length] = np.where(learned, ids[1:], IGNORE)
    return Batch(tokens, labels, lengths=lengths)
