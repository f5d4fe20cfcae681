"""What every tokenizer offers to the rest of the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.errors import UserError

_GROUP = 1 << 20  # characters encoded at a time


class Encoder(Protocol):
    """A quick way to the same ids."""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as the raw bytes of `token_dtype`."""


class Tokenizer(ABC):
    """Text to ids and back. Text never becomes a control token: "</s>" in a document is four letters.

    vocab_size: the highest id + 1; bos_id, eos_id, pad_id: None where the vocabulary has none; files: what defines it,
    by name, copied into checkpoints byte for byte; hash: sha256 (hex) of the defining file.

    `encode` is the reference: the library the vocabulary belongs to. `encode_documents` is for much text; it gives the
    same ids by a memo where the vocabulary allows that, and `describe` says which.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    files: dict[str, Path]
    hash: str
    _memo: tuple[Encoder | None, str] | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, with nothing added before or after. Raises UserError for a lone surrogate."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control tokens give nothing."""

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """The id of a piece such as "<|im_end|>", or None when the vocabulary does not hold it."""

    @abstractmethod
    def piece(self, number: int) -> str | None:
        """The piece of an id, as the vocabulary spells it, or None where there is none, or none that is text."""

    @abstractmethod
    def samples(self) -> list[str]:
        """What the pieces of text are in a text: strings to build texts from that this vocabulary has words for."""

    def describe(self) -> str:
        """One line: which encoder `encode_documents` uses, and why."""
        return self._built()[1]

    def use_reference(self) -> None:
        """From now on `encode_documents` encodes by the reference."""
        self._memo = None, "the reference encoder, as asked for"

    def _built(self) -> tuple[Encoder | None, str]:
        """The memo encoder, or None, and its description. It is built on first use: that takes about 0.2 s."""
        if self._memo is None:
            self._memo = self._build_memo()
        return self._memo

    def _build_memo(self) -> tuple[Encoder | None, str]:
        return None, "the reference encoder"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of several texts, in one thread (processes are the unit of parallelism here)."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Sequence[str], eod: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All ids of the texts one after another (dtype: `token_dtype`), and how many each has (int64).

        eod: an id put after every text and counted with it; a text without ids (the empty one) stays empty, as in
        Megatron-LM. Raises UserError for a lone surrogate."""
        dtype = token_dtype(self.vocab_size)
        end = b"" if eod is None else np.array([eod], dtype).tobytes()
        documents: list[bytes] = []
        for group in groups(texts, _GROUP):
            documents += [ids + end if ids else ids for ids in self._raw(group, dtype)]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) // dtype.itemsize
        return np.frombuffer(b"".join(documents), dtype), lengths

    def _raw(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[bytes]:
        memo = self._built()[0]
        if memo is None:
            return [np.array(ids, dtype).tobytes() for ids in self.encode_batch(list(texts))]
        try:
            return memo.encode(texts)
        except Exception:
            for text in texts:  # each library has its own way of refusing half a character
                check_encodable(text)
            raise

    def verify_sample(self, texts: Sequence[str]) -> None:
        """Raises UserError with the first text whose ids by `encode_documents` are not those of the reference."""
        flat, lengths = self.encode_documents(texts)
        ends = np.cumsum(lengths)
        for text, end, length in zip(texts, ends.tolist(), lengths.tolist(), strict=True):
            ours, theirs = flat[end - length : end].tolist(), self.encode(text)
            if ours != theirs:
                pairs = enumerate(zip(ours, theirs, strict=False))
                at = next((n for n, (one, two) in pairs if one != two), min(len(ours), len(theirs)))
                raise UserError(
                    f"the memo encoder and the reference differ at token {at}, after "
                    f"{self.decode(theirs[:at])[-40:]!r}: {ours[at : at + 4]} and {theirs[at : at + 4]}. This is a "
                    "fault of ours: please report it with the text, and encode with the reference meanwhile"
                )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM stores ids of a vocabulary in: u16 below 65,500 entries, else i32 (little endian)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def groups(texts: Sequence[str], characters: int) -> Iterator[Sequence[str]]:
    """Texts in order, as many at a time as have at most so many characters together, at least one."""
    begin = size = 0
    for number, text in enumerate(texts):
        if size + len(text) > characters and number > begin:
            yield texts[begin:number]
            begin, size = number, 0
        size += len(text)
    if begin < len(texts):
        yield texts[begin:]


def check_encodable(text: str) -> None:
    """Raises UserError naming the first lone surrogate: half a character, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"the text holds a lone surrogate U+{code:04X} at character {error.start}; it is half a character"
        ) from None
