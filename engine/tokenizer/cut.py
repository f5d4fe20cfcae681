"""The exact memo encoder of vocabularies that write a space as U+2581: sentencepiece BPE and its Hugging Face twins."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import numpy as np

from engine.tokenizer import blocks
from engine.tokenizer.blocks import BlockEncoder, by_density
from engine.tokenizer.safe_pairs import SafePairs, joined_in
from engine.tokenizer.segments import Ids, SegmentMemo, flat_ids, gathered, substrings

SPACE = "\u2581"
_SEPARATORS = (*range(31, 13, -1), *range(8, 0, -1))  # control characters that texts have least
_TOGETHER = 100
_LONE_SPACE = re.compile(r"(?<=[^ ]) (?=[^ ])")


class CutEncoder:
    """Cuts text before spaces or at every safe pair; which of the two decides speed only."""

    def __init__(
        self,
        pieces: Iterable[str],
        encode: Callable[[list[str]], Iterable[Ids]],
        normalize: Callable[[str], str],
        dtype: np.dtype[Any],
    ) -> None:
        """pieces: all that merging can make. encode: normalised segments to ids, adding nothing. normalize: a text that
        is not empty to what is encoded, with spaces as spaces."""
        joined = joined_in(piece.replace(SPACE, " ") for piece in pieces)
        pairs = SafePairs(joined)
        self._normalize = normalize

        memo = SegmentMemo(_Joined(encode, joined, dtype), dtype)
        self._characters = BlockEncoder(memo, blocks.at_pairs(pairs), pairs.windows, blocks.CHARACTERS_BLOCK)
        # Words only where no piece holds a space after something else.
        self._words = self._characters
        if all(one == " " for one, two in joined if two == " "):
            parts = partial(blocks.windows, breaks=_LONE_SPACE)
            memo = SegmentMemo(self._characters.spans, dtype)
            self._words = BlockEncoder(memo, blocks.at_words(_ends_of_words(joined)), parts, blocks.WORDS_BLOCK)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as bytes. Raises UnicodeEncodeError for a lone surrogate."""
        return by_density([self._normalize(text) if text else "" for text in texts], self._words, self._characters)


class _Joined:
    """Segments put together into texts and encoded as those: a hundred calls take longer than one, and a hundred lists.

    Between them stands a character that no piece joins with another; so each segment's ids stay what they are alone."""

    def __init__(
        self,
        encode: Callable[[list[str]], Iterable[Ids]],
        joined: Collection[tuple[str, str]],
        dtype: np.dtype[Any],
    ) -> None:
        self._encode, self._dtype = encode, dtype
        taken = {*chain.from_iterable(joined)}
        free = [code for code in _SEPARATORS if chr(code) not in taken]
        alone = flat_ids(encode(list(map(chr, free))), dtype)
        single = np.flatnonzero(np.diff(alone[1], prepend=0) == 1)
        self._separators = {free[at]: alone[0][alone[1][at] - 1] for at in single.tolist()}

    def __call__(self, buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See segments.Spans."""
        for code, number in self._separators.items():
            if bytes([code]) not in buffer:
                ids = self._joined_by(code, buffer, starts, ends)
                between = np.flatnonzero(ids == number)
                return np.delete(ids, between), between - np.arange(len(between))
        apart = [one.replace(" ", SPACE) for one in substrings(buffer, starts, ends)]
        return flat_ids(self._encode(apart), self._dtype)

    def _joined_by(self, code: int, buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The ids of the segments, that of the separator after each."""
        raw, stops = gathered(np.frombuffer(buffer, np.uint8), starts, ends - starts + 1)
        raw[stops - 1] = code
        whole = raw.tobytes()
        cuts = [0, *stops[_TOGETHER - 1 : -1 : _TOGETHER].tolist(), len(whole)]
        texts = [whole[begin:end].decode("utf-8").replace(" ", SPACE) for begin, end in pairwise(cuts)]
        return flat_ids(self._encode(texts), self._dtype)[0]


def _ends_of_words(joined: Collection[tuple[str, str]]) -> Callable[[bytes], np.ndarray]:
    """Words end before the first space of every run, and where an ASCII letter or digit is followed by an ASCII sign
    that stands behind none in any piece."""
    behind = {two for one, two in joined if one in blocks.ALNUM}
    signs = "".join({*blocks.ASCII} - {*blocks.ALNUM, *behind})
    last = blocks.flags(blocks.ASCII.replace(" ", "") + blocks.BEYOND, blocks.ALNUM)
    return partial(blocks.ends_of_words, last, blocks.flags(" ", signs))
