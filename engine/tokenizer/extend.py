"""Whether one vocabulary is another with pieces added, so that a model of the one can go on with the other."""

from __future__ import annotations

from engine.tokenizer.base import Tokenizer

SAMPLES, LENGTH = 256, 24
"""Texts that are compared, and the pieces in each; the texts are made of the vocabulary, so they are in its scripts."""


def extends(larger: Tokenizer, smaller: Tokenizer) -> bool:
    """Whether every id of `smaller` means the same in `larger`, and texts without new pieces get the same ids.

    Compares each piece's text, the special tokens' ids, and the ids of some texts."""
    count = smaller.vocab_size
    if larger.vocab_size < count:
        return False
    specials = [(one, other) for one, other in ((smaller.bos_id, larger.bos_id), (smaller.eos_id, larger.eos_id),
                                                (smaller.pad_id, larger.pad_id)) if one is not None]
    if any(one != other for one, other in specials):
        return False
    if any(_text(smaller, number) != _text(larger, number) for number in range(count)):
        return False
    for low in range(0, count, max(LENGTH, count // SAMPLES)):
        text = smaller.decode(range(low, min(low + LENGTH, count)))
        ids = larger.encode(text)
        if max(ids, default=0) < count and ids != smaller.encode(text):
            return False
    return True


def _text(tokenizer: Tokenizer, number: int) -> str:
    """What a piece says. Libraries differ in a space at its ends, and in how they write what is unknown."""
    return tokenizer.decode([number]).replace("\u2047", "").strip()
