"""Conversations as token ids with a mask of what is learned, in ChatML.

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
from dataclasses import dataclass

from engine.errors import UserError
from engine.tokenizer import Tokenizer
from engine.tokenizer.control import CHATML

START, END = CHATML
ANSWER = "assistant\n"
"""The header after which an answer is generated."""

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


@dataclass(frozen=True)
class Message:
    """One turn. `learn`: the loss is taken on its content and the end of the turn; only ever true of an assistant's."""

    role: str
    content: str
    learn: bool = False


class ChatEncoder:
    """Turns messages into ids and mask with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError when the tokenizer lacks the control pieces of ChatML."""
        start, end = tokenizer.token_id(START), tokenizer.token_id(END)
        if start is None or end is None:
            missing = " and ".join(piece for piece, at in ((START, start), (END, end)) if at is None)
            raise UserError(
                f"the tokenizer has no {missing}; chat needs the control pieces {START} and {END}: a model that is "
                "there takes its own tokenizer with the two added, --tokenizer DIR --vocab-size N; "
                "tools/train_tokenizer.py adds both to a new vocabulary"
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
