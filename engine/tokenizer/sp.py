"""A sentencepiece model as a Tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from engine.errors import UserError, shown
from engine.tokenizer import sp_file
from engine.tokenizer.base import Encoder, Tokenizer, check_encodable, token_dtype
from engine.tokenizer.control import control_pieces
from engine.tokenizer.cut import SPACE, CutEncoder
from engine.tokenizer.folder import added_tokens, hash_of, named_tokens, special_tokens
from engine.tokenizer.sp_check import open_model
from engine.tokenizer.sp_file import ModelFacts, model_facts, with_control, without_normalizer
from engine.tokenizer.sp_json import sentencepiece_json

_FEW = 10  # below this many texts, starting sentencepiece's thread for a batch takes longer than the work


class SentencePieceTokenizer(Tokenizer):
    """Reads a .model file, and beside it added_tokens.json and tokenizer_config.json, which may name ids behind its own
    and roles. Its control pieces, added tokens among them, are never matched in text.

    pieces: the entries of the model itself, whose ids come first."""

    pieces: int

    def __init__(self, model: Path, files: dict[str, Path]) -> None:
        """Raises UserError when the file is no sentencepiece model, or the files beside it contradict it."""
        content = model.read_bytes()
        self._model = open_model(content, model)
        self.pieces = int(self._model.GetPieceSize())
        named = named_tokens(files)
        self._model = self._guarded(model, control_pieces(named.values(), special_tokens(files)))
        self._added = self._beside(files, model)
        self.vocab_size = max([self.pieces - 1, *self._added.values()]) + 1
        own = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id()}
        roles = {role: self.token_id(named[role]) if role in named else None for role in own}
        self.bos_id, self.eos_id, self.pad_id = (
            _present(own[role]) if number is None else number for role, number in roles.items()
        )
        added = [repr(sorted(self._added.items())).encode()] if self._added else []
        self.files, self.hash = files, hash_of(content, *added)

    def _guarded(self, path: Path, control: Iterable[str]) -> sentencepiece.SentencePieceProcessor:
        """The model, with all that Triax uses as control pieces. Where it has them as text or as user-defined symbols,
        sentencepiece would find them in text, and take <s> for no bos."""
        model = self._model
        names = {*control, *control_pieces(model_facts(model.serialized_model_proto()).names)}
        ids = {name: int(model.PieceToId(name)) for name in names}
        loose = [
            name
            for name, number in ids.items()
            if model.IdToPiece(number) == name
            and not (model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number))
        ]
        return open_model(with_control(model.serialized_model_proto(), loose), path) if loose else model

    def _beside(self, files: dict[str, Path], model: Path) -> dict[str, int]:
        """Added tokens behind the model's own pieces."""
        found = added_tokens(files, self.pieces)
        for piece, number in found.items():
            if number < self.pieces and self._model.IdToPiece(number) != piece:
                raise UserError(
                    f"{model.parent}: the added token {shown(piece)!r} has the id {number}, which is that of "
                    f"{shown(self._model.IdToPiece(number))!r} in {model.name}"
                )
        return {piece: number for piece, number in found.items() if number >= self.pieces}

    def _build_memo(self) -> tuple[Encoder | None, str]:
        """The memo where it is exact for this model, else sentencepiece for everything."""
        proto = self._model.serialized_model_proto()
        facts = model_facts(proto)
        pieces = self._merged()
        reason = why_not_exact(facts, pieces)
        if reason is None and not hasattr(self._model, "Normalize"):
            reason = "this version of sentencepiece cannot normalise apart from encoding"
        if reason is not None:
            return None, f"sentencepiece itself: {reason}"
        self._normalizes = bool(facts.character_map) or facts.extra_spaces_removed
        self._dummy_prefix = facts.dummy_prefix
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=without_normalizer(proto))
        memo = CutEncoder(pieces, self._segments, self._normalized, token_dtype(self.vocab_size))
        return memo, "memo encoder (exact): sentencepiece encodes each new segment between safe cuts once"

    def _merged(self) -> list[str]:
        """All pieces that text can become by merging or matching."""
        ids = list(range(self.pieces))
        kinds = (self._model.IsControl(ids), self._model.IsUnknown(ids), self._model.IsByte(ids))
        others = map(any, zip(*kinds, strict=True))
        return [piece for piece, other in zip(self._model.IdToPiece(ids), others, strict=True) if not other]

    def _segments(self, segments: list[str]) -> list[list[int]]:
        if len(segments) < _FEW:
            return [self._bare.Encode(segment) for segment in segments]
        return self._bare.Encode(segments, num_threads=1)

    def _normalized(self, text: str) -> str:
        """What sentencepiece encodes, spaces shown as spaces."""
        if self._normalizes:
            return self._model.Normalize(text).replace(SPACE, " ")
        return " " * self._dummy_prefix + text.replace(SPACE, " ")

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        check_encodable(text)
        return self._model.Encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer.decode. Raises ValueError for an id outside the vocabulary."""
        numbers = [int(number) for number in ids]
        if any(not 0 <= number < self.vocab_size for number in numbers):
            raise ValueError(f"an id of {numbers} is outside the vocabulary of {self.vocab_size}")
        return self._model.Decode([number for number in numbers if number < self.pieces])

    def token_id(self, piece: str) -> int | None:
        """See Tokenizer.token_id."""
        if piece in self._added:
            return self._added[piece]
        number = int(self._model.PieceToId(piece))
        return number if self._model.IdToPiece(number) == piece else None  # an unknown piece maps to <unk>

    def piece(self, number: int) -> str | None:
        """See Tokenizer.piece."""
        if number < self.pieces:
            return str(self._model.IdToPiece(number)) if number >= 0 else None
        return next((piece for piece, added in self._added.items() if added == number), None)

    def samples(self) -> list[str]:
        """See Tokenizer.samples."""
        return [piece.replace(SPACE, " ") for piece in self._merged()]

    def tokenizer_json(self) -> dict[str, Any]:
        """The same vocabulary as a tokenizer.json. Raises CannotExpress."""
        return sentencepiece_json(self.proto(), self._added)

    def proto(self) -> bytes:
        """The model as it is used: serialized, with control pieces that text is never split into."""
        return bytes(self._model.serialized_model_proto())


def why_not_exact(facts: ModelFacts, pieces: Iterable[str]) -> str | None:
    """Why cutting would change this model's ids; None where it does not (see safe_pairs for the argument). pieces:
    those that text can become."""
    if facts.model_type != sp_file.BPE:
        unigram = facts.model_type == sp_file.UNIGRAM
        return "unigram scores are not additive over cuts" if unigram else "the model is not BPE"
    if not facts.byte_fallback:
        return "without byte fallback it joins neighbouring <unk>, also across a cut"
    if facts.suffix_space:
        return "spaces belong to the word before them"
    if not facts.spaces_escaped:
        return "spaces are not escaped"
    if any(" " in piece for piece in pieces):  # spaces are escaped in all others
        return "a user-defined symbol holds a space, which is matched before spaces are escaped"
    return None


def _present(number: int) -> int | None:
    return None if number < 0 else int(number)
