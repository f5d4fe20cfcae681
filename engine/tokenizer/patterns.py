"""Pre-tokenizer patterns of byte-level vocabularies, and the exact memo encoder behind them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import regex

from engine.tokenizer.blocks import (
    ALNUM,
    ASCII,
    BEYOND,
    CHARACTERS_BLOCK,
    WORDS_BLOCK,
    BlockEncoder,
    at_pairs,
    at_words,
    by_density,
    ends_of_words,
    flags,
    windows,
)
from engine.tokenizer.bpe import ByteVocabulary
from engine.tokenizer.merge import BatchMerge
from engine.tokenizer.safe_pairs import CODE_POINTS, SafeBytePairs
from engine.tokenizer.segments import SegmentMemo

_SPACES = r"|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _SPACES
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
LLAMA3 = _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _SPACES
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_ENDING}?|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_ENDING}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + _SPACES
)
KNOWN = frozenset((GPT2, R50K, CL100K, LLAMA3, QWEN2, O200K))
"""Patterns whose pieces are known to end where `_ends_of_words` says, whatever stands around: text may be cut there.

They are those of openai/gpt-2 and openai/tiktoken (R50K splits as GPT2 does; CL100K is GPT-4's as tiktoken has it
today, which keeps all whitespace at a text's end together; LLAMA3 is its earlier form), and of Qwen's tokenizer.json.
"""

_BREAK = regex.compile(r"(?<=[\p{L}\p{N}])\s(?=\S)")  # no piece goes on from a letter or digit into whitespace
_NEVER_INSIDE = regex.compile(r"\p{L}[^\p{L}\p{M}\p{N}']")
_OTHER_SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_SPACE_BYTES = {
    length: [int.from_bytes(one.encode()) for one in _OTHER_SPACES if len(one.encode()) == length] for length in (2, 3)
}

_LAST = flags(regex.sub(f"[ {_OTHER_SPACES}]", "", ASCII) + BEYOND, ALNUM)
_FIRST = flags(" ", regex.sub("[A-Za-z0-9']", "", ASCII))


class PatternEncoder:
    """Cuts text at the ends of words; behind that by the pattern, and its pieces at safe pairs."""

    def __init__(
        self,
        pattern: str,
        vocabulary: ByteVocabulary,
        dtype: np.dtype[Any],
        normalize: Callable[[str], str] | None = None,
    ) -> None:
        """pattern: one of KNOWN. dtype: of the ids."""
        self._normalize = normalize
        merge = BatchMerge(vocabulary, dtype)
        whole = vocabulary.whole_first and changed_by_cuts(merge.not_made())
        pairs = None if whole else SafeBytePairs(vocabulary.ids)
        memo = SegmentMemo(merge, dtype)
        cutter = at_pairs(pairs, partial(_ends_of_pieces, regex.compile(pattern).findall))
        parts = partial(windows, breaks=_BREAK)
        self._pieces = BlockEncoder(memo, cutter, parts, CHARACTERS_BLOCK)
        words = SegmentMemo(self._pieces.spans, dtype)
        self._words = BlockEncoder(words, at_words(_ends_of_words), parts, WORDS_BLOCK)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as bytes. Raises UnicodeEncodeError for a lone surrogate."""
        ready = [self._normalize(text) if self._normalize else text for text in texts]
        return by_density(ready, self._words, self._pieces)


def _ends_of_words(text: bytes) -> np.ndarray:
    """UTF-8 [n] -> at which bytes a known pattern's piece ends whatever stands around, bool [n + 1]: before spaces that
    follow something else than whitespace (inside of whitespace a piece may go on), and where an ASCII letter or digit
    is followed by an ASCII sign or whitespace, but for the apostrophe of "don't"."""
    found, raw = ends_of_words(_LAST, _FIRST, text), np.frombuffer(text, np.uint8)
    if text.isascii():
        return found
    at = np.flatnonzero((raw[1:] == 0x20) & (raw[:-1] >= 0x80)) + 1
    two = raw[at - 2].astype(np.int64) << 8 | raw[at - 1]
    three = raw.take(at - 3, mode="clip").astype(np.int64) << 16 | two
    found[at] = ~(np.isin(two, _SPACE_BYTES[2]) | np.isin(three, _SPACE_BYTES[3]))
    return found


def _ends_of_pieces(split: Callable[[str], list[str]], text: bytes, ends: np.ndarray) -> np.ndarray:
    """Where the pieces of several texts end, in characters. Texts that are ends of words anyway are split as one."""
    apart = ends[~_ends_of_words(text)[ends]]
    parts = (text[begin:end].decode("utf-8") for begin, end in pairwise([0, *apart.tolist()]))
    return np.cumsum([length for part in parts for length in map(len, split(part))], dtype=np.int64)


def changed_by_cuts(not_made: Iterable[bytes]) -> bool:
    """Whether cutting could change the ids of a vocabulary that looks a whole piece up before it merges. For parts of
    pieces that is only the same where merging makes each entry from its bytes. not_made: the entries that it does not.

    Entries that are no text, or go on from a letter to a sign, as "<|endoftext|>", are part of no pattern's piece."""
    for piece in not_made:
        with suppress(UnicodeDecodeError):
            if not _NEVER_INSIDE.search(piece.decode("utf-8")):
                return True
    return False


@cache
def _unsure() -> np.ndarray:
    """For every code point whether libraries may class it differently, as they know different versions of Unicode:
    what this Python's has not assigned (all above the third plane counts as that), and U+0295, which Unicode 15.1 made
    a letter without case."""
    last = 0x323B0
    table = np.ones(CODE_POINTS, bool)
    table[:last] = [unicodedata.category(chr(code)) == "Cn" for code in range(last)]
    table[0x295] = True
    return table


def doubtful(text: str) -> bool:
    """Whether a text holds a character that two pattern engines may class differently. Raises UnicodeEncodeError for a
    lone surrogate."""
    if text.isascii():
        return False
    return bool(_unsure().take(np.frombuffer(text.encode("utf-32-le"), "<u4")).any())
