"""A vocabulary that has no tokenizer.json gets one, and texts of many scripts prove that the two are equal."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError, shown
from engine.tokenizer.base import Tokenizer
from engine.tokenizer.bytelevel import ByteLevelTokenizer
from engine.tokenizer.control import CHATML
from engine.tokenizer.files import JSON
from engine.tokenizer.patterns import doubtful
from engine.tokenizer.scripts import many_scripts
from engine.tokenizer.sp import SentencePieceTokenizer
from engine.tokenizer.sp_json import CannotExpress
from engine.tokenizer.train_json import as_file
from engine.tokenizer.why_unequal import why_unequal


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two forms of one vocabulary, on texts."""

    texts: int
    differing: int
    """Texts whose ids, or the text of the ids, are not the same."""
    example: str = ""
    """The first of them and both sides' ids, in words."""
    reasons: str = ""
    """Why they differ, in words; "" where that is not known."""

    @property
    def equal(self) -> bool:
        """Whether every text gave the same ids, and the ids the same text."""
        return not self.differing


def comparison_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts to compare a vocabulary on. Those with characters that pattern engines class differently, as they know
    different versions of Unicode, are left out: no file can change that. Control pieces typed in a text are there."""
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    control = [*CHATML, *(piece for number in roles if number is not None and (piece := tokenizer.piece(number)))]
    typed = [f"{before}{piece}{after}" for piece in control for before, after in (("", ""), ("a ", "\nb"))]
    return [*(text for text in many_scripts(tokenizer.samples()) if not doubtful(text)), *typed]


def compare_texts(
    texts: Iterable[str], ours: Iterable[list[int]], theirs: Iterable[list[int]], read: Iterable[tuple[str, str]]
) -> Comparison:
    """ours, theirs: the ids of each text. read: what either side makes of ours."""
    count = differing = 0
    example = ""
    for text, one, two, (back, again) in zip(texts, ours, theirs, read, strict=True):
        count += 1
        if one == two and back == again:
            continue
        if not differing:
            at = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
            begin = max(0, at - 2)
            example = (
                f"'{shown(text, 80)}': ids {one[begin : at + 4]} and {two[begin : at + 4]} at token {begin}"
                if one != two
                else f"'{shown(text, 80)}' is read back as '{shown(back, 80)}' and '{shown(again, 80)}'"
            )
        differing += 1
    return Comparison(texts=count, differing=differing, example=example)


def make_tokenizer_json(tokenizer: Tokenizer) -> tuple[bytes, Comparison]:
    """The tokenizer.json of a vocabulary that came without one, and how it compares with it. Raises UserError where
    there is no way to write one, or the package `tokenizers` is missing to prove it with."""
    if not isinstance(tokenizer, SentencePieceTokenizer | ByteLevelTokenizer):
        raise UserError("only sentencepiece models, GPT-2's pair of files and tiktoken's files get a tokenizer.json")
    try:
        content = tokenizer.tokenizer_json()
    except CannotExpress as reason:
        raise UserError(f"a tokenizer.json cannot express this vocabulary: {reason}") from None
    if importlib.util.find_spec("tokenizers") is None:
        raise UserError('a tokenizer.json is proven with the package "tokenizers": pip install tokenizers')
    raw = as_file(content)
    return raw, _proven(tokenizer, raw, content)


def _proven(tokenizer: Tokenizer, raw: bytes, content: Mapping[str, Any]) -> Comparison:
    from engine.tokenizer.fast import FastTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / JSON
        path.write_bytes(raw)
        fast = FastTokenizer(path, {JSON: path})
    for token in content["added_tokens"]:
        if fast.token_id(token["content"]) != token["id"]:
            raise UserError(f"a tokenizer.json gives {shown(token['content'])!r} another id than {token['id']}")
    texts = comparison_texts(tokenizer)
    ours, theirs = tokenizer.encode_batch(texts), fast.encode_batch(texts)
    unknown = tokenizer.token_id(str(content["model"].get("unk_token") or "<unk>"))
    # What an unknown character is read back as is no part of a vocabulary: each library has a sign of its own.
    read = [("", "") if unknown in ids else (tokenizer.decode(ids), fast.decode(ids)) for ids in ours]
    found = compare_texts(texts, ours, theirs, read)
    return found if found.equal else replace(found, reasons=_reasons(tokenizer, raw, texts, ours, theirs))


def _reasons(tokenizer: Tokenizer, raw: bytes, texts: list[str], ours: list[list[int]], theirs: list[list[int]]) -> str:
    from tokenizers import Tokenizer as Rust

    parted = ((text, one, two) for text, one, two in zip(texts, ours, theirs, strict=True) if one != two)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return why_unequal(tokenizer.proto(), Rust.from_str(raw.decode()), parted)
    return "the engine in `tokenizers` reads the pattern of its pre-tokenizer otherwise" if any(parted) else ""
