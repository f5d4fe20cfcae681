"""What a sentencepiece .model says of itself, and a copy of it that normalises nothing.

The file is a protobuf message (`sentencepiece_model.proto` of google/sentencepiece); the few fields needed are read
from its wire format (protobuf.dev, "Encoding"), so that the package `protobuf` is not.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""
_PIECES, _TRAINER, _NORMALIZER, _SELF_TEST = 1, 2, 3, 4  # fields of ModelProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BARE = b"\x0a\x08identity" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
"""A NormalizerSpec: name "identity", no character map, no dummy prefix, extra spaces kept, spaces escaped."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The settings that decide how text is split. The defaults are sentencepiece's own, for fields left out."""

    model_type: int = UNIGRAM
    byte_fallback: bool = False
    suffix_space: bool = False
    """Spaces are put after words instead of before them."""
    normalizer: str = ""
    """The name that its normaliser was trained under, such as nmt_nfkc or identity."""
    character_map: bytes = b""
    """Text is normalised by a map such as NFKC's; empty for none."""
    dummy_prefix: bool = True
    extra_spaces_removed: bool = True
    spaces_escaped: bool = True
    names: tuple[str, str, str] = ("<s>", "</s>", "<pad>")
    """The pieces that are bos, eos and pad, where the vocabulary holds them."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """An entry of the vocabulary; its place is its id."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


def model_facts(proto: bytes) -> ModelFacts:
    """Reads a serialized model's settings. Raises ValueError where it is no protobuf message."""
    specs: dict[int, dict[int, int | bytes]] = {_TRAINER: {}, _NORMALIZER: {}}
    for field, value, _ in _fields(proto, _end_of_pieces(proto)):
        if field in specs and isinstance(value, bytes):
            specs[field].update((number, content) for number, content, _ in _fields(value))
    trainer, normalizer = specs[_TRAINER], specs[_NORMALIZER]
    return ModelFacts(
        model_type=_int(trainer.get(3), UNIGRAM),
        byte_fallback=bool(_int(trainer.get(35), 0)),
        suffix_space=bool(_int(trainer.get(24), 0)),
        normalizer=_text(normalizer.get(1), ""),
        character_map=_bytes(normalizer.get(2)),
        dummy_prefix=bool(_int(normalizer.get(3), 1)),
        extra_spaces_removed=bool(_int(normalizer.get(4), 1)),
        spaces_escaped=bool(_int(normalizer.get(5), 1)),
        names=(_text(trainer.get(46), "<s>"), _text(trainer.get(47), "</s>"), _text(trainer.get(48), "<pad>")),
    )


def piece_texts(proto: bytes) -> list[bytes]:
    """The bytes of each piece. Raises ValueError where the file, or a piece, is no protobuf message."""
    texts: list[bytes] = []
    for field, value, _ in _fields(proto):
        if field == _PIECES:
            if not isinstance(value, bytes):
                raise ValueError("a piece is no message")
            found = [text for number, text, _ in _fields(value) if number == 1]
            if not found or not isinstance(found[-1], bytes):
                raise ValueError(f"piece {len(texts)} has no text")
            texts.append(found[-1])
    return texts


def read_pieces(proto: bytes) -> list[Piece]:
    """All entries, by id."""
    return [_piece(value) for field, value, _ in _fields(proto) if field == _PIECES and isinstance(value, bytes)]


def with_control(proto: bytes, names: Collection[str]) -> bytes:
    """The same model in which pieces of these names are control pieces: text is never split into one. Ids stay."""
    wanted = {name.encode() for name in names}
    kind = bytes([3 << 3 | _VARINT, CONTROL])
    changed = []
    for field, value, raw in _fields(proto):
        if field == _PIECES and isinstance(value, bytes):
            fields = list(_fields(value))
            if any(number == 1 and content in wanted for number, content, _ in fields):
                raw = _field(_PIECES, b"".join(part for number, _, part in fields if number != 3) + kind)
        changed.append(raw)
    return b"".join(changed)


def _piece(message: bytes) -> Piece:
    fields = {number: value for number, value, _ in _fields(message)}
    score = _bytes(fields.get(2))
    return Piece(
        text=_text(fields.get(1), ""),
        score=struct.unpack("<f", score)[0] if len(score) == 4 else 0.0,
        kind=_int(fields.get(3), NORMAL),
    )


def _int(value: int | bytes | None, default: int) -> int:
    if isinstance(value, bytes):
        raise ValueError("a setting is no number")
    return default if value is None else value


def _bytes(value: int | bytes | None) -> bytes:
    return value if isinstance(value, bytes) else b""


def _text(value: int | bytes | None, default: str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else default


def without_normalizer(proto: bytes) -> bytes:
    """The same model for text that is normalised already: no prefix, no map, every space kept.

    The self test is left out: it was written for the normaliser that is gone."""
    end = _end_of_pieces(proto)
    kept = [raw for field, _, raw in _fields(proto, end) if field not in (_NORMALIZER, _SELF_TEST)]
    return b"".join([proto[:end], *kept, bytes([_NORMALIZER << 3 | _BYTES, len(_BARE)]), _BARE])


def _end_of_pieces(proto: bytes) -> int:
    """Where the first piece of 128 bytes or more begins, or whatever follows the pieces: they are nearly all of it."""
    at, last = 0, len(proto) - 1
    while at < last and proto[at] == _PIECES << 3 | _BYTES and proto[at + 1] < 128:
        at += 2 + proto[at + 1]
    return at


def with_rounded_scores(proto: bytes, step: float) -> bytes:
    """The same model, the scores of its normal pieces rounded to multiples of `step`, a power of two."""
    return b"".join(
        _field(_PIECES, _with_rounded_score(value, step)) if field == _PIECES and isinstance(value, bytes) else raw
        for field, value, raw in _fields(proto)
    )


def _with_rounded_score(piece: bytes, step: float) -> bytes:
    fields = list(_fields(piece))
    # Field 2 is the score, field 3 the type, which is left out where it is 1, "normal".
    if any(number == 3 and value != 1 for number, value, _ in fields):
        return piece
    rounded = b""
    for number, value, raw in fields:
        if number == 2 and isinstance(value, bytes):
            score = round(struct.unpack("<f", value)[0] / step) * step
            raw = bytes([2 << 3 | _FIXED32]) + struct.pack("<f", score)
        rounded += raw
    return rounded


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    length, written = len(content), bytearray([number << 3 | _BYTES])
    while length > 127:
        written.append(length & 127 | 128)
        length >>= 7
    return bytes(written) + bytes([length]) + content


def _fields(message: bytes, at: int = 0) -> Iterator[tuple[int, int | bytes, bytes]]:
    """The fields of a message from byte `at` on: number, value, and the raw bytes of both."""
    while at < len(message):
        begin = at
        key, at = _varint(message, at)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(message, at)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
            if kind == _BYTES:
                length, at = _varint(message, at)
            elif not length:
                raise ValueError(f"wire type {kind} at byte {begin}")
            value, at = message[at : at + length], at + length
        if at > len(message):
            raise ValueError(f"the field at byte {begin} ends past the message")
        yield key >> 3, value, message[begin:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"a number at byte {at} does not end")
