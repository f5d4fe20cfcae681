"""A sentencepiece vocabulary as a Hugging Face tokenizer.json.

BPE: sentencepiece joins the two neighbours whose join has the best score; Hugging Face wants the joins listed.

Unigram: both take the split with the best sum of scores, but sentencepiece adds in float32 and Hugging Face in float64,
so sums that differ by less than a rounding come out in another order (train_json.py rounds the scores of our own
vocabularies, so that they cannot). Control pieces and the names of bytes are entries of Hugging Face's lattice too:
they get a score so low that spelling them in characters always wins, where the vocabulary holds these characters.

Whether the result is the same vocabulary is not taken for granted: see equal.py.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.tokenizer.sp_file import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelFacts,
    Piece,
    model_facts,
    read_pieces,
)

_SPACE = "\u2581"  # how sentencepiece writes a space
_NEVER = 4096  # times the lowest score: more than the characters of a control piece cost together
_LEADING = 1 << 10  # spaces that a text begins with; sentencepiece drops all where it drops some
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""An added token that is special."""


class CannotExpress(Exception):
    """Why a tokenizer.json cannot say the same, in words."""


def sentencepiece_json(proto: bytes, added: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The tokenizer.json of a serialized model. added: text and id of control pieces behind its own. Raises
    CannotExpress with the reason where Hugging Face has no word for what the model does."""
    facts, pieces = model_facts(proto), read_pieces(proto)
    added = dict(sorted((added or {}).items(), key=lambda item: item[1]))
    _check(facts, pieces, added)
    symbols = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    model = _bpe(facts, pieces, added) if facts.model_type == BPE else _unigram(facts, pieces, added)
    kept = [(n, piece) for n, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": piece.text, **FLAGS}
            # A symbol of the user's is found in text, which sentencepiece has normalised by then.
            | ({"normalized": True, "special": False} if piece.kind == USER_DEFINED else {})
            for number, piece in kept
        ]
        + [{"id": number, "content": text, **FLAGS} for text, number in added.items()],
        "normalizer": _sequence("normalizers", _normalizers(facts, symbols)),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _sequence("decoders", _decoders(facts)),
        "model": model,
    }


def _check(facts: ModelFacts, pieces: Sequence[Piece], added: Mapping[str, int]) -> None:
    if facts.model_type not in (BPE, UNIGRAM):
        raise CannotExpress("its model is neither BPE nor unigram, but of words or characters")
    if facts.suffix_space:
        raise CannotExpress("it puts spaces behind words (treat_whitespace_as_suffix)")
    if not facts.spaces_escaped:
        raise CannotExpress("it does not mark spaces (escape_whitespaces is off)")
    if any(piece.kind == UNUSED for piece in pieces):
        raise CannotExpress("it holds pieces that are marked as unused")
    if facts.model_type == UNIGRAM and list(added.values()) != list(range(len(pieces), len(pieces) + len(added))):
        raise CannotExpress(f"the added tokens leave out ids between {len(pieces)} and {max(added.values())}")


def _normalizers(facts: ModelFacts, symbols: Sequence[str]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if facts.character_map:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(facts.character_map).decode()})
    if facts.extra_spaces_removed:
        # At the end, sentencepiece also takes off marks of a space that stood in the text themselves.
        steps += [_replace(pattern, by) for pattern, by in ((r"\A +", ""), (" {2,}", " "), (f"[ {_SPACE}]+\\z", ""))]
    if facts.dummy_prefix and symbols:
        # The library normalises the symbols too before it looks for them; they must stay as they are.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(_replace(rf"\A(?!(?:{alone})\z)(?=[\s\S])", _SPACE))
    elif facts.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoders(facts: ModelFacts) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    if facts.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if facts.dummy_prefix or facts.extra_spaces_removed:
        most = _LEADING if facts.extra_spaces_removed else 1
        steps.append({"type": "Strip", "content": " ", "start": most, "stop": 0})
    return steps


def _sequence(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}


def _bpe(facts: ModelFacts, pieces: Sequence[Piece], added: Mapping[str, int]) -> dict[str, Any]:
    """Merges are every way to cut a piece into two pieces, in the order of the pieces' scores."""
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    ranked = sorted((p for p in pieces if p.kind == NORMAL and len(p.text) > 1), key=lambda piece: -piece.score)
    cuts = ((piece.text[:at], piece.text[at:]) for piece in ranked for at in range(1, len(piece.text)))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unknown(pieces)[1],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": facts.byte_fallback,
        "vocab": {piece.text: number for number, piece in enumerate(pieces)} | dict(added),
        "merges": [f"{left} {right}" for left, right in cuts if left in normal and right in normal],
    }


def _unigram(facts: ModelFacts, pieces: Sequence[Piece], added: Mapping[str, int]) -> dict[str, Any]:
    scores = [piece.score for piece in pieces if piece.kind == NORMAL]
    never = _NEVER * min(-1.0, *scores)
    vocabulary = [[piece.text, piece.score if piece.kind == NORMAL else never] for piece in pieces]
    return {"type": "Unigram", "unk_id": _unknown(pieces)[0], "byte_fallback": facts.byte_fallback,
            "vocab": vocabulary + [[text, never] for text in added]}  # fmt: skip


def _unknown(pieces: Sequence[Piece]) -> tuple[int, str]:
    """Id and text of the unknown piece, which every model has."""
    return next((number, piece.text) for number, piece in enumerate(pieces) if piece.kind == UNKNOWN)
