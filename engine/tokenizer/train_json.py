"""A sentencepiece vocabulary as a Hugging Face tokenizer.json with the same ids.

BPE: sentencepiece joins the two neighbours whose join has the best score; Hugging Face wants the joins listed.

Unigram: both take the split with the best sum of scores, but sentencepiece adds in float32 and Hugging Face in float64,
so sums that differ by less than a rounding come out in another order: with scores as they are trained, 22 of 106
encyclopedia articles differed. `exact_scores` rounds each score to a multiple of 1/32 of a nat, which changes a piece's
probability by 1.6% at most. Then float32 adds without rounding up to 2^24 / 32 = 524,288 nats, some 50,000 tokens, and
so far the two agree exactly. Control pieces and the names of bytes are entries of Hugging Face's lattice too: they get
a score so low that spelling them in characters always wins, for which the vocabulary has to hold these characters
(`spelling`).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from engine.tokenizer.sp_file import with_rounded_scores
from engine.tokenizer.train_text import BOS, BYTES, EOS, NAMED, PAD, UNK

SCORE_STEP = 1 / 32
_SPACE = "\u2581"  # how sentencepiece writes a space
_NEVER = 4096  # times the lowest score: more than the characters of a control piece cost together
_COMPARED_BYTES = 2 << 20


def exact_scores(proto: bytes) -> bytes:
    """A unigram model whose scores float32 adds exactly."""
    return with_rounded_scores(proto, SCORE_STEP)


def spelling(special: Sequence[str]) -> str:
    """The characters that control pieces and byte names are spelled with, each once."""
    return "".join(sorted(set("".join((*NAMED, *special, *BYTES)))))


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, kind: str) -> dict[str, Any]:
    """The tokenizer.json of a model ("bpe" or "unigram") with byte fallback, a space put before the text, and no other
    normalisation, as Llama's is."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [n for n in range(model.GetPieceSize()) if model.IsControl(n) or model.IsUnknown(n)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": model.IdToPiece(number), **flags} for number in control],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": _bpe(model) if kind == "bpe" else _unigram(model),
    }


def _normal(model: sentencepiece.SentencePieceProcessor) -> list[bool]:
    """For each id whether it is a piece of text."""
    return [
        not (model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number))
        for number in range(model.GetPieceSize())
    ]


def _bpe(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Merges are every way to cut a piece into two pieces, in the order of the pieces' scores."""
    pieces = [model.IdToPiece(number) for number in range(model.GetPieceSize())]
    normal = set(itertools.compress(pieces, _normal(model)))
    ranked = sorted((p for p in normal if len(p) > 1), key=lambda piece: -model.GetScore(model.PieceToId(piece)))
    cuts = ((piece[:at], piece[at:]) for piece in ranked for at in range(1, len(piece)))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNK,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": [f"{left} {right}" for left, right in cuts if left in normal and right in normal],
    }


def _unigram(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    scores = [model.GetScore(number) for number in range(model.GetPieceSize())]
    normal = _normal(model)
    never = _NEVER * min(-1.0, *itertools.compress(scores, normal))
    vocabulary = [
        [model.IdToPiece(number), score if is_text else never]
        for number, (score, is_text) in enumerate(zip(scores, normal, strict=True))
    ]
    return {"type": "Unigram", "unk_id": model.unk_id(), "byte_fallback": True, "vocab": vocabulary}


def tokenizer_config() -> dict[str, Any]:
    """The tokenizer_config.json beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,  # true would eat spaces before punctuation when decoding
    }


def as_file(content: dict[str, Any]) -> bytes:
    """The bytes of a JSON file; half characters, which names of files may hold, as JSON's own escapes."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "backslashreplace")


def compare(model: sentencepiece.SentencePieceProcessor, path: Path, texts: Iterable[str]) -> tuple[int, int] | None:
    """(documents compared, documents with other ids) of the first 2 MiB of texts between the model and the
    tokenizer.json at `path`; None where the package `tokenizers`, which is optional, is missing."""
    if importlib.util.find_spec("tokenizers") is None:
        return None
    from engine.tokenizer.fast import FastTokenizer

    fast = FastTokenizer(path, {path.name: path})
    compared = differing = size = 0
    for text in texts:
        compared += 1
        differing += model.Encode(text) != fast.encode(text)
        size += len(text.encode("utf-8"))
        if size >= _COMPARED_BYTES:
            break
    return compared, differing
