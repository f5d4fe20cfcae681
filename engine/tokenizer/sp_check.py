"""A sentencepiece model opened with suspicion: sentencepiece itself takes files whose bytes are damaged, and its errors
repeat them, so that Python cannot even read the message."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from engine.errors import UserError, shown
from engine.signature import described
from engine.tokenizer import sp_file

_PROBE = "a \u4e2d\U0001f600\u0301\tb  1"
"""What a whole model can encode, whatever its vocabulary."""


def open_model(proto: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    """The model of these bytes, which come from `path`. Raises UserError when they are none, or are damaged."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        _check_pieces(proto)
        if not model.LoadFromSerializedProto(proto):
            raise ValueError("sentencepiece does not read it")
        _check_use(model)
    except UnicodeDecodeError:
        raise UserError(f"{path} is a damaged sentencepiece model: it holds pieces that are not UTF-8; take a copy of "
                        "it") from None
    except (RuntimeError, OSError, ValueError, IndexError, OverflowError) as error:
        what = shown((str(error).splitlines() or ["it cannot be read"])[0])
        raise UserError(f"{path} is no sentencepiece model, or a damaged one: {what} (it {described(path)})") from None
    return model


def _check_pieces(proto: bytes) -> None:
    """Raises ValueError unless the whole file is a protobuf message with pieces, UnicodeDecodeError unless these are
    text."""
    texts = sp_file.piece_texts(proto)
    if not texts:
        raise ValueError("it holds no pieces")
    for number, text in enumerate(texts):
        if not text.decode("utf-8"):
            raise ValueError(f"piece {number} is empty")
    sp_file.model_facts(proto)


def _check_use(model: sentencepiece.SentencePieceProcessor) -> None:
    """Raises what a damaged model raises when it is used."""
    size = model.GetPieceSize()
    model.IdToPiece(list(range(size)))
    for number in (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id()):
        if number >= size:
            raise ValueError(f"a control piece has the id {number} of {size}")
    ids = model.Encode(_PROBE)
    if any(not 0 <= number < size for number in ids):
        raise ValueError("it gives ids that are outside its vocabulary")
    model.Decode(ids)
    without = sentencepiece.SentencePieceProcessor()
    without.LoadFromSerializedProto(sp_file.without_normalizer(model.serialized_model_proto()))
