"""How well a vocabulary fits a text: characters that have a piece, bytes and characters per token, script by script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import regex
import sentencepiece

from engine.tokenizer.base import Tokenizer

MEASURED_BYTES = 8 << 20
_BATCH = 1 << 18  # characters encoded at a time
_SCRIPTS = (
    "Latin", "Han", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Telugu", "Thai",
    "Hangul", "Georgian", "Armenian", "Ethiopic", "Khmer",
)  # fmt: skip
_GROUPS = regex.compile(
    "|".join(
        [rf"(?P<{name}>\p{{Script={name}}})" for name in _SCRIPTS]
        + [r"(?P<Kana>[\p{Script=Hiragana}\p{Script=Katakana}])", r"(?P<other_letters>\p{L})", r"(?P<digits>\p{N})",
           r"(?P<whitespace>\s)", r"(?P<symbols>.)"]
    ),
    regex.DOTALL,
)  # fmt: skip
_LESS_TELLING = ("digits", "symbols", "whitespace")  # a piece belongs to the first of its characters that tells most
_SPACE = "\u2581"


@dataclass(frozen=True, kw_only=True)
class ScriptFigures:
    """One script's part of the text. A token belongs to the script of its piece's first letter, a token that is a byte
    to that of its character."""

    script: str
    characters: int
    covered: float
    """Share of its characters that have a piece of their own; the others are spelled in bytes."""
    tokens: int
    bytes_per_token: float
    characters_per_token: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a vocabulary makes of a text."""

    documents: int
    bytes: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    """A word is what stands between whitespace: of no meaning in Chinese or Japanese."""
    covered: float
    scripts: tuple[ScriptFigures, ...]
    """By number of characters, most first."""


def measure(
    tokenizer: Tokenizer, model: sentencepiece.SentencePieceProcessor, documents: Iterable[str],
    limit: int = MEASURED_BYTES,
) -> Figures:
    """The figures of the first `limit` bytes of documents (at least one). model: what the tokenizer holds."""
    characters: Counter[str] = Counter()
    tokens = np.zeros(tokenizer.vocab_size, np.int64)
    number = size = words = 0
    for batch in _batches(documents, limit):
        for text in batch:
            characters.update(text)
            words += len(text.split())
            size += len(text.encode("utf-8"))
        number += len(batch)
        tokens += np.bincount(tokenizer.encode_documents(batch)[0], minlength=tokenizer.vocab_size)
    total = int(tokens.sum())
    scripts = _scripts(model, characters, tokens)
    covered = sum(one.covered * one.characters for one in scripts)
    return Figures(
        documents=number,
        bytes=size,
        tokens=total,
        bytes_per_token=size / max(total, 1),
        tokens_per_word=total / max(words, 1),
        covered=covered / max(characters.total(), 1),
        scripts=tuple(scripts),
    )


def _batches(documents: Iterable[str], limit: int) -> Iterator[list[str]]:
    batch: list[str] = []
    held = size = 0
    for text in documents:
        batch.append(text)
        held += len(text)
        size += len(text.encode("utf-8"))
        if held >= _BATCH or size >= limit:
            yield batch
            batch, held = [], 0
        if size >= limit:
            return
    if batch:
        yield batch


def script_of(text: str) -> str:
    """The script of a text's first letter, or where it has none what it is made of."""
    found = [match.lastgroup or "symbols" for match in _GROUPS.finditer(text)]
    letters = [group for group in found if group not in _LESS_TELLING]
    return letters[0] if letters else min(found, key=_LESS_TELLING.index, default="symbols")


def _scripts(
    model: sentencepiece.SentencePieceProcessor, characters: Counter[str], tokens: np.ndarray
) -> list[ScriptFigures]:
    of_characters, known, of_tokens, of_bytes, in_tokens = (Counter[str]() for _ in range(5))
    for character, count in characters.items():
        group = script_of(character)
        of_characters[group] += count
        if not model.IsUnknown(model.PieceToId(_SPACE if character == " " else character)):
            known[group] += count
        else:
            size = len(character.encode("utf-8")) * count
            of_tokens[group] += size
            of_bytes[group] += size
            in_tokens[group] += count
    for piece, count in _used(model, tokens):
        group = script_of(piece)
        of_tokens[group] += count
        of_bytes[group] += len(piece.encode("utf-8")) * count
        in_tokens[group] += len(piece) * count
    return [
        ScriptFigures(
            script=group,
            characters=count,
            covered=known[group] / count,
            tokens=of_tokens[group],
            bytes_per_token=of_bytes[group] / max(of_tokens[group], 1),
            characters_per_token=in_tokens[group] / max(of_tokens[group], 1),
        )
        for group, count in sorted(of_characters.items(), key=lambda item: (-item[1], item[0]))
    ]


def _used(model: sentencepiece.SentencePieceProcessor, tokens: np.ndarray) -> Iterator[tuple[str, int]]:
    """The pieces of text that were used, a space shown as a space, and how often. Bytes are counted by characters."""
    for number in np.flatnonzero(tokens).tolist():
        if not model.IsByte(number):
            yield model.IdToPiece(number).replace(_SPACE, " "), int(tokens[number])
