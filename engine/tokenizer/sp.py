"""A sentencepiece model as a Tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from engine.errors import UserError
from engine.tokenizer.base import Tokenizer, check_encodable, file_hash


class SentencePieceTokenizer(Tokenizer):
    """Reads a .model file. Its control pieces are never matched in text: sentencepiece keeps them apart."""

    def __init__(self, model: Path, files: dict[str, Path]) -> None:
        """Raises UserError when the file is no sentencepiece model."""
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(model))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model} is no sentencepiece model: {str(error).splitlines()[0]}") from None
        self.vocab_size = int(self._model.GetPieceSize())
        self.bos_id = _present(self._model.bos_id())
        self.eos_id = _present(self._model.eos_id())
        self.pad_id = _present(self._model.pad_id())
        self.files, self.hash = files, file_hash(model)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        check_encodable(text)
        return self._model.Encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer.decode. Raises ValueError for an id outside the vocabulary."""
        numbers = [int(number) for number in ids]
        if any(not 0 <= number < self.vocab_size for number in numbers):
            raise ValueError(f"an id of {numbers} is outside the vocabulary of {self.vocab_size}")
        return self._model.Decode(numbers)

    def token_id(self, piece: str) -> int | None:
        """See Tokenizer.token_id."""
        number = int(self._model.PieceToId(piece))
        return number if self._model.IdToPiece(number) == piece else None  # an unknown piece maps to <unk>


def _present(number: int) -> int | None:
    return None if number < 0 else int(number)
