"""Training a sentencepiece vocabulary, and the same vocabulary as a Hugging Face tokenizer.json.

sentencepiece's defaults are wrong for a language model: they fold newlines and repeated spaces, normalise the text and
leave out sentences over 4,192 bytes without a word. Here nothing is normalised, and documents are cut by us. The same
texts in the same order give the same bytes, on any number of cores.
"""

from __future__ import annotations

import io
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from engine import __version__
from engine.errors import UserError
from engine.tokenizer.control import CHATML
from engine.tokenizer.folder import hash_of
from engine.tokenizer.sp import SentencePieceTokenizer
from engine.tokenizer.sp_json import sentencepiece_json
from engine.tokenizer.train_json import as_file, compare, exact_scores, spelling, tokenizer_config
from engine.tokenizer.train_output import ABOUT, CONFIG, JSON, MODEL, place
from engine.tokenizer.train_report import Figures, measure
from engine.tokenizer.train_text import BOS, BYTES, EOS, NAMED, PAD, SENTENCE_BYTES, UNK, Survey, sentences, survey

__all__ = ["BOS", "EOS", "MODELS", "PAD", "SPECIAL", "UNK", "TrainReport", "check_request", "sentences", "train"]

MODELS = ("bpe", "unigram")
LARGEST = 1 << 24
SPECIAL = CHATML
_LONGEST_SPECIAL = 100
_WORST_SHARE = 0.01  # of documents whose ids differ; above it the tokenizer.json would be another vocabulary
_EVERY_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What was learned from, and how it fits the first 8 MiB of that."""

    vocab_size: int
    documents: int
    text_bytes: int
    replaced: int
    """Characters that were given to sentencepiece's trainer as spaces, because it can't take them (U+2585 and NUL)."""
    spelled: int
    """Control pieces and byte names spelled out in the text, which its trainer skips."""
    compared: int | None
    """Documents encoded both by the .model and by the tokenizer.json; None without the package `tokenizers`."""
    differing: int
    """Those of them whose ids differ."""
    json_written: bool
    figures: Figures

    @property
    def bytes_per_token(self) -> float:
        """Of the measured text."""
        return self.figures.bytes_per_token

    @property
    def covered(self) -> float:
        """Share of characters that have a piece of their own; the others are spelled in bytes."""
        return self.figures.covered


def check_request(vocab_size: int, model: str, special: Sequence[str]) -> None:
    """Raises UserError for what no text could give."""
    if model not in MODELS:
        raise UserError(f'model "{model}" is neither {" nor ".join(MODELS)}')
    for number, piece in enumerate(special):
        _check_special(piece)
        if piece in special[:number]:
            raise UserError(f"the special piece {piece!r} is given twice")
    least = len(NAMED) + len(special) + len(BYTES) + 1
    if vocab_size > LARGEST:
        raise UserError(f"a vocabulary of {vocab_size:,} is larger than the {LARGEST:,} that can be trained")
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} cannot be trained: {len(BYTES)} bytes, {len(NAMED) + len(special)} control "
            f"pieces and the space need {least}, and pieces of text come on top; use a larger --vocab-size"
        )


def _check_special(piece: str) -> None:
    if not piece:
        raise UserError("a special piece is empty (look for a comma too many)")
    if piece in NAMED or piece in BYTES:
        raise UserError(f"the special piece {piece!r} is in every vocabulary already")
    if len(piece) > _LONGEST_SPECIAL:
        raise UserError(f"a special piece of {len(piece)} characters is too long; {_LONGEST_SPECIAL} is the most")
    if not piece.isprintable() or re.search(r"[\s\u2581\u2585]", piece):
        raise UserError(f"the special piece {piece!r} holds a space or a character that cannot be seen")
    if len(piece) == 1 or piece.isalnum():
        raise UserError(
            f"the special piece {piece!r} is text, and no piece of text could be spelled so any more; put marks around "
            f"it: <|{piece}|>"
        )


def train(
    documents: Callable[[], Iterable[str]],
    output: Path,
    *,
    vocab_size: int,
    model: str = "bpe",
    special: Sequence[str] = SPECIAL,
    about: Mapping[str, Any] | None = None,
    say: Say | None = None,
) -> TrainReport:
    """Trains on `documents()` (read four times) and writes tokenizer.model, tokenizer.json with its config, and
    training.json, which tells how they came about; `about` is added to it. `say` hears now and then that it goes on.

    Raises UserError when the text cannot give vocab_size pieces, there is none, or the folder cannot be written;
    nothing is left there then, nor at Ctrl-C. (Ctrl-C leaves sentencepiece's thread running until the process ends.)"""
    check_request(vocab_size, model, special)
    found = survey(documents(), special)
    if not found.text_bytes:
        raise UserError(f"a vocabulary of {vocab_size} cannot be trained: there is no text to train on")
    coverage = found.coverage(vocab_size - len(BYTES) - len(NAMED) - len(special))
    proto = _patiently(lambda: _learn(sentences(documents()), vocab_size, model, special, coverage), say)
    if model == "unigram":
        proto = exact_scores(proto)
    try:
        contents, report = _finish(proto, found, documents)
    except OSError as error:
        raise UserError(f"cannot write to the folder for temporary files (TMPDIR names another): "
                        f"{error.strerror or error}") from None
    settings = {"vocab_size": vocab_size, "model": model, "special": list(special), "character_coverage": coverage}
    contents[ABOUT] = as_file(_about(settings, report, proto, about or {}))
    place(output, contents)
    return report


def _learn(texts: Iterator[str], vocab_size: int, model: str, special: Sequence[str], coverage: float) -> bytes:
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
            required_chars=spelling(special) if model == "unigram" else "",
            max_sentence_length=SENTENCE_BYTES,
            num_threads=4,  # a constant: unigram's sums depend on it, and the machine must not
            train_extremely_large_corpus=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"a vocabulary of {vocab_size} cannot be trained: {_reason(str(error))}") from None
    return proto.getvalue()


def _reason(said: str) -> str:
    """sentencepiece's message in the user's words."""
    if high := re.search(r"size too high \(\d+\)\. Please set it to a value <= (\d+)", said):
        return (f"the text gives no more than {int(high[1])} pieces; lower --vocab-size to {int(high[1])}, or train on "
                "more text")
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return (f"the text's characters alone need {low[1]}, and pieces longer than one character come on top; use a "
                "larger --vocab-size")
    if "sentences_.empty()" in said:
        return "the text is nothing but line ends"
    last = said.strip().splitlines()[-1] if said.strip() else "sentencepiece gives no reason"
    return last.rpartition("] ")[2] or last  # what comes before is sentencepiece's source file and line


def _patiently(work: Callable[[], bytes], say: Say | None) -> bytes:
    """What `work` gives, run in a thread: this one can say that it goes on, and hears Ctrl-C."""
    results: list[bytes] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="sentencepiece")
    begun = said = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if say is not None and time.monotonic() - said >= _EVERY_S:
            said = time.monotonic()
            say(f"sentencepiece is training: {said - begun:,.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def _finish(
    proto: bytes, found: Survey, documents: Callable[[], Iterable[str]]
) -> tuple[dict[str, bytes], TrainReport]:
    """The files to write, but for training.json, and what the vocabulary is worth."""
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    contents = {MODEL: proto, JSON: as_file(sentencepiece_json(proto)), CONFIG: as_file(tokenizer_config())}
    with tempfile.TemporaryDirectory() as name:
        paths = {file: Path(name) / file for file in contents}
        for file, content in contents.items():
            paths[file].write_bytes(content)
        figures = measure(SentencePieceTokenizer(paths[MODEL], {MODEL: paths[MODEL]}), model, documents())
        compared = compare(model, paths[JSON], documents())
    number, differing = compared or (0, 0)
    written = differing <= _WORST_SHARE * number
    if not written:
        del contents[JSON], contents[CONFIG]
    report = TrainReport(
        vocab_size=model.GetPieceSize(),
        documents=found.documents,
        text_bytes=found.text_bytes,
        replaced=found.replaced,
        spelled=found.spelled,
        compared=number if compared else None,
        differing=differing,
        json_written=written,
        figures=figures,
    )
    return contents, report


def _about(
    settings: Mapping[str, Any], report: TrainReport, proto: bytes, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of training.json. Without times and machines: the same training gives the same file."""
    return {
        "format": "triax-vocabulary",
        "version": 1,
        "made_by": {"triax": __version__, "sentencepiece": sentencepiece.__version__,
                    "python": platform.python_version()},
        "tokenizer": {"hash": hash_of(proto), "vocab_size": report.vocab_size},
        "settings": settings,
        **about,
        "report": asdict(report),
    }  # fmt: skip
