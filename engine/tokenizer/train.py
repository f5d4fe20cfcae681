"""Training a sentencepiece vocabulary, and the same vocabulary as a Hugging Face tokenizer.json.

sentencepiece's defaults are wrong for a language model: they fold newlines and repeated spaces, normalise the text and
leave out sentences over 4,192 bytes without a word. Here nothing is normalised, and documents are cut by us.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from engine.errors import UserError
from engine.tokenizer.sp import SentencePieceTokenizer

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0, 1, 2, 3
_SENTENCE_BYTES = 4192  # sentencepiece's own limit, above which it drops a sentence
_SPACE = "\u2581"  # how sentencepiece writes a space
_RESERVED = str.maketrans({"\u2585": " ", "\0": " "})  # its trainer drops sentences that hold one of these
_MEASURED_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What was learned: entries, and on the text it was measured on (its first 8 MiB) coverage and compression."""

    vocab_size: int
    measured_bytes: int
    bytes_per_token: float
    covered: float
    """Share of characters that have a piece of their own; the others are spelled in bytes."""


def train(
    documents: Callable[[], Iterable[str]],
    output: Path,
    *,
    vocab_size: int,
    model: str = "bpe",
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
) -> TrainReport:
    """Trains on `documents()` (read three times) and writes tokenizer.model, and for bpe tokenizer.json and its config.

    Raises UserError when the text cannot give vocab_size pieces or there is none."""
    if model not in ("bpe", "unigram"):
        raise UserError(f'model "{model}" is neither bpe nor unigram')
    coverage = _coverage(documents(), vocab_size - 260 - len(special))  # 256 bytes and <unk> <s> </s> <pad>
    proto = _train_model(sentences(documents()), vocab_size, model, special, coverage)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "tokenizer.model", proto)
        if model == "bpe":
            trained = sentencepiece.SentencePieceProcessor(model_proto=proto)
            _write(output / "tokenizer.json", _json(fast_tokenizer(trained)))
            _write(output / "tokenizer_config.json", _json(_fast_config()))
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    path = output / "tokenizer.model"
    return _measure(SentencePieceTokenizer(path, {path.name: path}), documents())


def sentences(documents: Iterable[str], limit: int = _SENTENCE_BYTES) -> Iterator[str]:
    """Documents cut into pieces of at most `limit` bytes of UTF-8: at line ends where possible, else anywhere."""
    for document in documents:
        piece: list[str] = []
        size = 0
        for line in _short_lines(document.translate(_RESERVED), limit):
            length = len(line.encode("utf-8"))
            if size + length > limit:
                yield "".join(piece)
                piece, size = [], 0
            piece.append(line)
            size += length
        if piece:
            yield "".join(piece)


def _short_lines(text: str, limit: int) -> Iterator[str]:
    step = limit // 4  # a character is at most four bytes
    for line in text.splitlines(keepends=True):
        if len(line) <= step:
            yield line
        else:
            yield from (line[at : at + step] for at in range(0, len(line), step))


def _coverage(documents: Iterable[str], room: int) -> float:
    """The share of characters to give a piece of their own: nearly all, less where that would fill half the room
    (Chinese in a small vocabulary). sentencepiece takes no less than 0.98; the rest is spelled in bytes."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    common = sum(number for _, number in counts.most_common(max(room // 2, 1)))
    return min(0.99995, max(0.98, common / max(counts.total(), 1)))


def _train_model(
    texts: Iterator[str], vocab_size: int, model: str, special: Sequence[str], coverage: float
) -> bytes:
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=proto,
            vocab_size=vocab_size,
            model_type=model,
            control_symbols=list(special),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=coverage,
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=4,  # a constant: unigram's sums depend on it, and the machine must not
            train_extremely_large_corpus=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        said = str(error).strip() or "no text was read"
        reason = said.splitlines()[-1].rpartition("] ")[2]  # what comes before is sentencepiece's source file and line
        if "required_chars" in reason:
            reason = f"the text's characters alone need more ({reason.split('. ')[1]}); use a larger --vocab-size"
        raise UserError(f"a vocabulary of {vocab_size} cannot be trained: {reason}") from None
    return proto.getvalue()


def fast_tokenizer(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The tokenizer.json of a sentencepiece BPE model with byte fallback and a leading space, as Llama's is.

    sentencepiece joins the two neighbours whose join has the best score. Hugging Face wants the joins listed: every
    way to cut a piece into two pieces, in the order of the pieces' scores."""
    pieces = [model.IdToPiece(number) for number in range(model.GetPieceSize())]
    normal = {
        piece
        for number, piece in enumerate(pieces)
        if not (model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number))
    }
    ranked = sorted((p for p in normal if len(p) > 1), key=lambda piece: -model.GetScore(model.PieceToId(piece)))
    cuts = ((piece[:at], piece[at:]) for piece in ranked for at in range(1, len(piece)))
    merges = [f"{left} {right}" for left, right in cuts if left in normal and right in normal]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": piece, **flags}
            for number, piece in enumerate(pieces)
            if model.IsControl(number) or model.IsUnknown(number)
        ],
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
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def _fast_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,  # true would eat spaces before punctuation when decoding
    }


def _measure(tokenizer: SentencePieceTokenizer, documents: Iterable[str]) -> TrainReport:
    total = tokens = characters = covered = 0
    known: dict[str, bool] = {"\n": tokenizer.token_id("\n") is not None, " ": True}
    for document in documents:
        total += len(document.encode("utf-8"))
        tokens += len(tokenizer.encode(document))
        characters += len(document)
        for character in document:
            if character not in known:
                known[character] = tokenizer.token_id(character) is not None
            covered += known[character]
        if total >= _MEASURED_BYTES:
            break
    return TrainReport(
        vocab_size=tokenizer.vocab_size,
        measured_bytes=total,
        bytes_per_token=total / max(tokens, 1),
        covered=covered / max(characters, 1),
    )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
