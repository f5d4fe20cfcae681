"""Chat rows as token ids: encoded once, at the start of a run, and divided into those that are learned from and those
that are held back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from engine.data.chat import ChatEncoder, Message
from engine.errors import UserError, shown
from engine.tune.files import read_chats

_LISTED = 8


@dataclass(frozen=True)
class Encoded:
    """Rows of token ids, one behind the other.

    starts, int64 [rows + 1]: row i is ids[starts[i] : starts[i + 1]]; ids, int32, and learned, bool [all ids]; digests,
    uint64 [rows]: of what the messages say, whatever the tokenizer."""

    starts: np.ndarray
    ids: np.ndarray
    learned: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch: a row of n + 1 ids is n tokens with n labels."""
        return len(self.ids) - len(self)

    @property
    def supervised(self) -> int:
        """Tokens of an epoch that have a label. (A row's first id is never learned.)"""
        return int(self.learned.sum())

    def select(self, chosen: np.ndarray) -> Encoded:
        """The rows where `chosen`, bool [rows], is true, in their order."""
        lengths = np.diff(self.starts)
        of_ids = np.repeat(chosen, lengths)
        return Encoded(np.concatenate([[0], np.cumsum(lengths[chosen])]), self.ids[of_ids], self.learned[of_ids],
                       self.digests[chosen])

    def split(self, share: float) -> tuple[Encoded, Encoded]:
        """(rows to learn from, rows held back): the `share` of the rows whose digests are lowest.

        Which rows these are hangs on what they say alone: not on their order, the seed, the tokenizer or the layout,
        and rows that say the same are never on both sides. Raises UserError where nothing would be left."""
        count = max(1, round(share * len(self)))
        ordered = np.sort(self.digests)
        below = self.digests < ordered[min(count, len(self) - 1)]
        held = below if below.any() else self.digests == ordered[0]  # more than asked, where the first are all alike
        if held.all() or count >= len(self):
            raise UserError(f"--split {share} of {len(self):,} rows leaves none to learn from (rows that say the same "
                            "are on one side); lower --split, or give --valid-data")
        return self.select(~held), self.select(held)


@dataclass
class Tally:
    """What became of the rows of some files. rows: all; dropped: with nothing to learn within seq_len; truncated: cut
    there; empty: answers without a word; unused: how many rows had a key that was not read."""

    seq_len: int
    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    unused: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line, of what is zero only what matters."""
        parts = [f"{self.rows:,} rows", f"{self.dropped:,} dropped (nothing to learn within {self.seq_len} tokens)",
                 f"{self.truncated:,} cut"]
        if self.empty:
            parts.append(f"{self.empty:,} empty answer{'s' if self.empty > 1 else ''} not learned")
        if self.unused:
            named = [f"{shown(key, 40)} ({count:,})" for key, count in self.unused.most_common(_LISTED)]
            more = len(self.unused) - len(named)
            parts.append(f"keys not read: {', '.join(named)}{f' and {more} more' if more else ''}")
        return ", ".join(parts)


def encode_files(paths: Sequence[str | Path], encoder: ChatEncoder, seq_len: int,
                 ignored: Collection[str] = ()) -> tuple[Encoded, Tally]:
    """The rows of all files that have something to learn within seq_len tokens, and what became of the others.

    Raises UserError for a row that cannot be understood, and when nothing can be learned."""
    tally = Tally(seq_len)
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    digests: list[int] = []
    for chat in read_chats(paths, ignored):
        tally.rows += 1
        tally.empty += chat.empty_answers
        tally.unused.update(chat.unused)
        row, mask = encoder.encode(chat.messages)
        within = mask[: seq_len + 1]
        if not any(within):
            tally.dropped += 1
            continue
        tally.truncated += len(row) > len(within)
        ids.append(np.array(row[: len(within)], np.int32))
        learned.append(np.array(within, np.bool_))
        digests.append(_digest(chat.messages))
    if not ids:
        raise UserError(_nothing_to_learn(paths, tally))
    rows = Encoded(np.cumsum([0, *map(len, ids)]), np.concatenate(ids), np.concatenate(learned),
                   np.array(digests, np.uint64))
    return rows, tally


def check_files(paths: Sequence[str | Path], seq_len: int, ignored: Collection[str] = ()) -> Tally:
    """Reads every row, and encodes none: the tally knows no lengths. Raises UserError as encode_files does, but where
    rows are too long."""
    tally, learnable = Tally(seq_len), 0
    for chat in read_chats(paths, ignored):
        tally.rows += 1
        tally.empty += chat.empty_answers
        tally.unused.update(chat.unused)
        learnable += any(message.learn for message in chat.messages)
    if not learnable:
        raise UserError(_nothing_to_learn(paths, tally))
    return tally


def _nothing_to_learn(paths: Sequence[str | Path], tally: Tally) -> str:
    named = ", ".join(shown(path) for path in paths[:_LISTED])
    empty = f", and {tally.empty:,} of its answers are empty" if tally.empty else ""
    return (f"{named}: none of its {tally.rows} rows has anything to learn within {tally.seq_len} tokens; learned is "
            f'what the assistant says, unless "train" is false or "weight" 0{empty}; longer prompts need a larger '
            "--seq-len")


def _digest(messages: Sequence[Message]) -> int:
    said = blake2b(digest_size=8)
    for message in messages:
        for text in (message.role, message.content):
            data = text.encode()
            said.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(said.digest(), "little")
