"""Why a sentencepiece model and the tokenizer.json made of it part on a text: the first step that differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from engine.errors import shown
from engine.tokenizer.sp_file import NORMAL, UNIGRAM, USER_DEFINED, model_facts, read_pieces

_MOST = 1000  # texts looked at
_SAME_SCORE = 1e-4  # of a sum of scores: rounding in float32 stays far below, another split is rarely so near
Parted = tuple[str, Sequence[int], Sequence[int]]
"""A text, sentencepiece's ids and those of tokenizer.json."""


def why_unequal(proto: bytes, fast: Any, parted: Iterable[Parted]) -> str:
    """The reasons in words, each with its number of texts, the commonest first. fast: the package's own tokenizer."""
    look = _Reasons(proto, fast)
    found = Counter(look.of(*one) for one, _ in zip(parted, range(_MOST), strict=False))
    return "; ".join(f"{reason} ({count:,} text{'s' if count > 1 else ''})" for reason, count in found.most_common())


class _Reasons:
    """Both forms of a vocabulary, step by step."""

    def __init__(self, proto: bytes, fast: Any) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._facts, self._pieces, self._fast = model_facts(proto), read_pieces(proto), fast
        self._symbols = [piece.text for piece in self._pieces if piece.kind == USER_DEFINED]

    def of(self, text: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
        """Why the ids of a text are not the same."""
        symbols = "user-defined pieces are looked for in text otherwise"
        if self._of_kind(ours, USER_DEFINED) != self._of_kind(theirs, USER_DEFINED):
            return symbols
        if not self._normalized_alike(text):
            without = text
            for symbol in self._symbols:
                without = without.replace(symbol, "")
            if without != text and self._normalized_alike(without):
                return symbols
            return f'its normaliser "{shown(self._facts.normalizer, 40)}" changes text in ways that `tokenizers` cannot'
        if self._model.Decode(list(ours)) != self._model.Decode(list(theirs)):
            return "a text spells the name of a byte or control piece, for whose characters there are no pieces"
        one, two = (self._score(ids) for ids in (ours, theirs))
        if self._facts.model_type == UNIGRAM and abs(one - two) <= _SAME_SCORE * max(1.0, abs(one)):
            return "of splits that are equally good, sentencepiece takes another, as it adds scores in float32"
        return "the pieces are joined in another order"

    def _of_kind(self, ids: Sequence[int], kind: int) -> list[int]:
        return sorted(number for number in ids if number < len(self._pieces) and self._pieces[number].kind == kind)

    def _normalized_alike(self, text: str) -> bool:
        step = self._fast.normalizer
        return bool(self._model.Normalize(text) == (text if step is None else step.normalize_str(text)))

    def _score(self, ids: Sequence[int]) -> float:
        known = (self._pieces[number] for number in ids if number < len(self._pieces))
        return sum(piece.score for piece in known if piece.kind == NORMAL)
