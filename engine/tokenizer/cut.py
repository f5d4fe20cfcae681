"""The exact memo encoder of vocabularies that write a space as U+2581: sentencepiece BPE and its Hugging Face twins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from engine.tokenizer.fine import FineEncoder
from engine.tokenizer.memo import Ids, Memo, at_first_spaces, packed, spaced, windows
from engine.tokenizer.safe_pairs import SafePairs, joined_in

SPACE = "\u2581"
_LONE_SPACE = re.compile(r"(?<=[^ ]) (?=[^ ])")


class CutEncoder:
    """Cuts text before spaces, by `str.split` and a dict, or at every safe pair; which of the two decides speed only.

    A word's key leaves out the space before it; further spaces of a run belong to the word that follows them.
    """

    def __init__(
        self,
        pieces: Iterable[str],
        encode: Callable[[list[str]], Iterable[Ids]],
        normalize: Callable[[str], tuple[str, bool]],
        dtype: np.dtype[Any],
    ) -> None:
        """pieces: all that merging can make. encode: normalised segments to ids, adding nothing. normalize: a text that
        is not empty to the one to encode, with " " for U+2581, and whether one more space stands before it."""
        joined = joined_in(pieces)
        pairs = SafePairs(joined)
        self._normalize = normalize
        self._fine = FineEncoder(pairs, encode, dtype, windows=pairs.windows)
        self._starts = Memo(lambda keys: packed(list(encode(keys)), dtype))
        self._words = Memo(lambda keys: packed(list(encode([SPACE + key for key in keys])), dtype))
        # No piece holds a space after something else, so that text may be cut before every run of spaces.
        self._words_stand_apart = all(one == SPACE for one, two in joined if two == SPACE)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as bytes. Raises what `encode` raises for a lone surrogate."""
        by_words: list[list[bytes | bytearray] | None] = []
        fine: list[str] = []
        for text in texts:
            text, prefixed = self._normalize(text) if text else ("", False)
            if self._words_stand_apart and spaced(text):
                by_words.append(self._look_up(text, prefixed))
            else:
                by_words.append(None)
                fine.append(SPACE * prefixed + text.replace(" ", SPACE))
        self._starts.fill()
        self._words.fill()
        others = iter(self._fine.encode(fine))
        return [next(others) if found is None else b"".join(found) for found in by_words]

    def _look_up(self, text: str, prefixed: bool) -> list[bytes | bytearray]:
        """What the memo has, or will have once filled, for each word."""
        found: list[bytes | bytearray] = []
        for window in windows(text, _LONE_SPACE):
            if prefixed and window.startswith(" "):  # not the first space of its run
                keys = at_first_spaces(" " + window, SPACE)[1:]
            else:
                keys = at_first_spaces(window, SPACE)
            if not prefixed:  # no space stands before the first word of all
                found.append(self._starts[keys[0]])
                del keys[0]
            found += map(self._words.__getitem__, keys)
            prefixed = False
        return found
