"""What makes a vocabulary that is trained here exactly expressible as a tokenizer.json (sp_json.py writes it).

With scores as they are trained, unigram's sums in float32 and float64 came out in another order in 22 of 106
encyclopedia articles. `exact_scores` rounds each score to a multiple of 1/32 of a nat, which changes a piece's
probability by 1.6% at most. Then float32 adds without rounding up to 2^24 / 32 = 524,288 nats, some 50,000 tokens, and
so far the two agree exactly. Control pieces and the names of bytes are entries of the lattice: spelling them in
characters must be possible, for which the vocabulary has to hold these characters (`spelling`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from engine.tokenizer.sp_file import with_rounded_scores
from engine.tokenizer.train_text import BOS, BYTES, EOS, NAMED, PAD, UNK

SCORE_STEP = 1 / 32
_COMPARED_BYTES = 2 << 20


def exact_scores(proto: bytes) -> bytes:
    """A unigram model whose scores float32 adds exactly."""
    return with_rounded_scores(proto, SCORE_STEP)


def spelling(special: Sequence[str]) -> str:
    """The characters that control pieces and byte names are spelled with, each once."""
    return "".join(sorted(set("".join((*NAMED, *special, *BYTES)))))


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
