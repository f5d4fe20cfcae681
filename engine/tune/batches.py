"""The steps of a tuning run: encoded rows in an order that is a pure function of (seed, epoch), one row a sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.data.batches import Batch
from engine.data.chat import ChatEncoder
from engine.data.samples import mix, permute
from engine.errors import UserError
from engine.tokenizer import Tokenizer
from engine.tune.rows import read_chats

IGNORE = -100
"""Label of what is not learned."""

_CHAT = 0x63686174  # keeps the order of chat rows apart from a corpus' samples under the same seed


class ChatBatches:
    """The steps of a tuning run: rows in an order that is a pure function of (seed, epoch), one row a sequence.

    All rows are encoded once, at the start. A row longer than seq_len loses its end; one that has nothing to learn
    within seq_len is dropped and counted. A step is as long as its longest row over all data-parallel ranks, rounded up
    to `multiple`, so every layout computes the same step. Padding is by length: it is never learned, whatever its id.

    origin: samples before step 0, above 0 in a run resumed with another global batch.
    rows, dropped, truncated: counts; tokens: of the rows kept, in an epoch; supervised: those of them with a label;
    epoch_size: rows kept.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, seq_len: int, global_batch: int, dp_rank: int = 0,
                 dp: int = 1, seed: int = 0, multiple: int = 8, origin: int = 0) -> None:
        """Raises UserError for a bad row, a tokenizer without ChatML's pieces, and when nothing can be learned."""
        self.global_batch, self.dp_rank, self.dp, self.multiple = global_batch, dp_rank, dp, multiple
        self.seq_len, self.origin = seq_len, origin
        self.rows = self.dropped = self.truncated = self.supervised = 0
        self._key = mix(mix(seed) ^ mix(_CHAT))
        self._load(path, ChatEncoder(tokenizer))
        self.epoch_size = len(self._starts) - 1
        self.tokens = len(self._ids) - self.epoch_size  # a row of n + 1 ids is n tokens with n labels
        if self.supervised == 0:
            raise UserError(
                f"{path}: none of its {self.rows} rows has anything to learn within {seq_len} tokens; learned is what "
                'the assistant says, unless "train" is false or "weight" 0; longer prompts need a larger --seq-len'
            )

    def _load(self, path: str | Path, encoder: ChatEncoder) -> None:
        ids: list[np.ndarray] = []
        learned: list[np.ndarray] = []
        for messages in read_chats(path):
            self.rows += 1
            row, mask = encoder.encode(messages)
            within = mask[: self.seq_len + 1]
            if not any(within):
                self.dropped += 1
                continue
            self.truncated += len(row) > len(within)
            self.supervised += sum(within)
            ids.append(np.array(row[: len(within)], np.int32))
            learned.append(np.array(within, np.bool_))
        self._starts = np.cumsum([0, *map(len, ids)])  # [rows kept + 1]
        self._ids = np.concatenate(ids) if ids else np.empty(0, np.int32)  # [all ids]
        self._learned = np.concatenate(learned) if learned else np.empty(0, np.bool_)

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
        return self._batch(rows[self.dp_rank * share : (self.dp_rank + 1) * share], self._longest(rows))

    def head(self, count: int) -> Batch:
        """The file's first rows, at most `count`, as one batch: the same at every evaluation."""
        rows = np.arange(min(count, self.epoch_size))
        return self._batch(rows, self._longest(rows))

    def _longest(self, rows: np.ndarray) -> int:
        return int((self._starts[rows + 1] - self._starts[rows]).max()) - 1

    def _batch(self, rows: np.ndarray, longest: int) -> Batch:
        """These rows, padded to `longest` rounded up."""
        shape = (len(rows), -(-longest // self.multiple) * self.multiple)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        lengths = self._starts[rows + 1] - self._starts[rows] - 1
        for i, row in enumerate(rows):
            ids = self._ids[self._starts[row] : self._starts[row + 1]]
            learned = self._learned[self._starts[row] + 1 : self._starts[row + 1]]
            tokens[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(learned, ids[1:], IGNORE)
        return Batch(tokens, labels, lengths=lengths)

    def summary(self) -> str:
        """One line for the start of a run."""
        return (
            f"{self.rows:,} rows, {self.dropped:,} dropped (nothing to learn within {self.seq_len} tokens), "
            f"{self.truncated:,} cut; {self.tokens:,} tokens, {self.supervised:,} of them learned "
            f"({self.supervised / self.tokens:.1%})"
        )
