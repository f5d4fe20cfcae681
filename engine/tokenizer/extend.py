"""Whether one vocabulary is another with pieces added, so that a model of the one can go on with the other."""

from __future__ import annotations

from engine.errors import shown
from engine.tokenizer.base import Tokenizer

SAMPLES, LENGTH = 256, 24
"""Texts that are compared, and the pieces in each; the texts are made of the vocabulary, so they are in its scripts."""


def why_no_extension(larger: Tokenizer, smaller: Tokenizer) -> str | None:
    """What of `smaller` is not the same in `larger`, in words; None where every id means the same and texts without
    new pieces get the same ids.

    Compares each piece's text, the special tokens' ids, and the ids of some texts."""
    count = smaller.vocab_size
    if larger.vocab_size < count:
        return f"it has {larger.vocab_size:,} pieces, and that one {count:,}"
    for role in ("bos", "eos", "pad"):
        one, other = getattr(smaller, f"{role}_id"), getattr(larger, f"{role}_id")
        if one is not None and one != other:
            return f"its {role} is {_named(larger, other)}, and was {_named(smaller, one)}"
    for number in range(count):
        if _text(smaller, number) != _text(larger, number):
            return f"id {number} is {_named(larger, number)}, and was {_named(smaller, number)}"
    for low in range(0, count, max(LENGTH, count // SAMPLES)):
        text = smaller.decode(range(low, min(low + LENGTH, count)))
        ids = larger.encode(text)
        if max(ids, default=0) < count and ids != smaller.encode(text):
            return f"it cuts '{shown(text, 40)}' otherwise"
    return None


def _named(tokenizer: Tokenizer, number: int | None) -> str:
    return "none" if number is None else f"{number} '{shown(str(tokenizer.piece(number)), 40)}'"


def _text(tokenizer: Tokenizer, number: int) -> str:
    """What a piece says. Libraries differ in a space at its ends, and in how they write what is unknown."""
    return tokenizer.decode([number]).replace("\u2047", "").strip()
