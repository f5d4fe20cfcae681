"""A byte-level vocabulary, of GPT-2's two files or tiktoken's one, as a Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.tokenizer.bpe import ByteVocabulary, byte_alphabet
from engine.tokenizer.patterns import CL100K, GPT2, R50K
from engine.tokenizer.sp_json import FLAGS

_REWRITTEN: Mapping[str, str] = MappingProxyType({
    R50K: GPT2,
    # Without possessive numbers ({1,3}+ repeats there) and without $, which there stands before every line end.
    CL100K: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?![\s\S])|"
            r"\s*[\r\n]|\s+(?!\S)|\s",
})  # fmt: skip
"""Patterns that the engine in `tokenizers` reads otherwise, and those that mean the same to it."""


def byte_level_json(
    vocabulary: ByteVocabulary, pattern: str, special: Mapping[str, int], *, nfc: bool
) -> dict[str, Any]:
    """The tokenizer.json. special: text and id of tokens that no text becomes. nfc: text is brought to NFC first."""
    shown = byte_alphabet()

    def word(piece: bytes) -> str:
        return "".join(shown[byte] for byte in piece)

    # A rank file ranks pairs by what they make: of the ways to make one piece, that of the earlier parts comes first.
    longest = max(map(len, vocabulary.ids))
    pairs = [(rank, vocabulary.ids.get(one, 0), vocabulary.ids.get(two, 0), one, two)
             for one, two, rank in vocabulary.pairs(longest)]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _REWRITTEN.get(pattern, pattern)}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, **FLAGS}
            for text, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.whole_first,
            "vocab": {word(piece): number for piece, number in vocabulary.ids.items()} | dict(special),
            "merges": [f"{word(one)} {word(two)}" for *_, one, two in sorted(pairs)],
        },
    }
