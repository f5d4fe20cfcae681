"""What every tokenizer offers to the rest of the engine."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError

_FOLDER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Tokenizer(ABC):
    """Text to ids and back. Text never becomes a control token: "</s>" in a document is four letters.

    vocab_size: the highest id + 1; bos_id, eos_id, pad_id: None where the vocabulary has none; files: what defines it,
    by name, copied into checkpoints byte for byte; hash: sha256 (hex) of the defining file.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    files: dict[str, Path]
    hash: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, with nothing added before or after. Raises UserError for a lone surrogate."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control tokens give nothing."""

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """The id of a piece such as "<|im_end|>", or None when the vocabulary does not hold it."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of several texts, in one thread (processes are the unit of parallelism here)."""
        return [self.encode(text) for text in texts]


def check_encodable(text: str) -> None:
    """Raises UserError naming the first lone surrogate: half a character, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"the text holds a lone surrogate U+{code:04X} at character {error.start}; it is half a character"
        ) from None


def folder_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files that are in a folder, by name."""
    return {name: folder / name for name in _FOLDER_FILES if (folder / name).is_file()}


def file_hash(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
