"""Conversations as token ids with a mask of what is learned, in ChatML; and the batches of a tuning run.

    [BOS] then for each message   <|im_start|> role \\n content <|im_end|> \\n

<|im_start|> and <|im_end|> are control pieces, put in by id. Everything else is text, encoded with special tokens off,
so that "<|im_end|>" typed by a user stays text. What stands between two control pieces is one string to the tokenizer,
as it is to every tokenizer that splits its input at special tokens: the ids are those of transformers'
apply_chat_template. One exception: no token reaches across the end of an assistant's header, "assistant\\n", for there
generation starts, from the header's ids alone. Where a tokenizer would join the header's newline with the whitespace an
answer begins with, the answer is encoded as what follows the word itself. Training and generation share one function.

Learned: an assistant's content and its <|im_end|>. Not learned: its header, and the newline after <|im_end|>.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.batches import Batch
from engine.data.chat_rows import Message, read_chats
from engine.data.samples import mix, permute
from engine.errors import UserError
from engine.tokenizer import Tokenizer

IGNORE = -100
"""Label of what is not learned."""
START, END = "<|im_start|>", "<|im_end|>"
ANSWER = "assistant\n"
"""The header after which an answer is generated."""

_CHAT = 0x63686174  # keeps the order of chat rows apart from a corpus' samples under the same seed

# Where a tokenizer's BOS is <|im_start|> itself (Qwen's kin) it is there already: never two.
CHATML_TEMPLATE = (
    "{% if bos_token is defined and bos_token and bos_token != '<|im_start|>' %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The same rendering for transformers and every server that reads its templates; no default system prompt."""


class ChatEncoder:
    """Turns messages into ids and mask with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError when the tokenizer lacks the control pieces of ChatML."""
        start, end = tokenizer.token_id(START), tokenizer.token_id(END)
        if start is None or end is None:
            missing = " and ".join(piece for piece, at in ((START, start), (END, end)) if at is None)
            raise UserError(
                f"the tokenizer has no {missing}; chat needs the control pieces {START} and {END}: train a vocabulary "
                "with tools/train_tokenizer.py, which adds both, or use a tokenizer that has them"
            )
        self.tokenizer, self.start, self.end = tokenizer, start, end
        bos = tokenizer.bos_id
        self.prefix = [] if bos is None or bos == start else [bos]
        self.newline = tokenizer.encode("\n")
        self.header = tokenizer.encode(ANSWER)

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids [n], and for each whether it is learned [n]."""
        ids = list(self.prefix)
        learned = [False] * len(ids)
        for message in messages:
            if message.role == "assistant":
                header, content = self.header, self._answer(message.content)
            else:
                header, content = self.tokenizer.encode(f"{message.role}\n{message.content}"), []
            ids += [self.start, *header, *content, self.end, *self.newline]
            learned += [False] * (1 + len(header)) + [message.learn] * (len(content) + 1)
            learned += [False] * len(self.newline)
        return ids, learned

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids from which the assistant's next answer is generated: a prefix of what `encode` gives with it."""
        return [*self.encode(messages)[0], self.start, *self.header]

    def _answer(self, content: str) -> list[int]:
        """The ids of an answer as they follow the header's. Encoding it behind its context, not alone, keeps a
        tokenizer that puts a space before every text from putting one between header and answer."""
        for before in (ANSWER, ANSWER.rstrip()):
            head, whole = self.tokenizer.encode(before), self.tokenizer.encode(before + content)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.tokenizer.encode(content)


def encode_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids [n] of a conversation and, for each, whether it is learned [n]. Raises UserError as ChatEncoder does."""
    return ChatEncoder(tokenizer).encode(messages)


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
        for i, row in enumerate(rows):
            ids = self._ids[self._starts[row] : self._starts[row + 1]]
            learned = self._learned[self._starts[row] + 1 : self._starts[row + 1]]
            tokens[i, : len(ids) - 1] = ids[:-1]
            labels[i, : len(ids) - 1] = np.where(learned, ids[1:], IGNORE)
        return Batch(tokens, labels)

    def summary(self) -> str:
        """One line for the start of a run."""
        return (
            f"{self.rows:,} rows, {self.dropped:,} dropped (nothing to learn within {self.seq_len} tokens), "
            f"{self.truncated:,} cut; {self.tokens:,} tokens, {self.supervised:,} of them learned "
            f"({self.supervised / self.tokens:.1%})"
        )
