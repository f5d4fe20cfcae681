"""The tokenizer of a serving folder: every client reads a tokenizer.json, so an export has one, proven equal.

Left to guess from a sentencepiece model or from tiktoken's ranks, transformers drops normalisers and puts BOS before
texts, each version in its own way, and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.strict_json import parse_object
from engine.errors import UserError, shown
from engine.hf.assets import dump, tokenizer_config
from engine.tokenizer import load_tokenizer
from engine.tokenizer.equal import Comparison, make_tokenizer_json
from engine.tokenizer.files import CONFIG, JSON, is_tokenizer
from engine.tokenizer.folder import adds_bos
from engine.tokenizer.train_json import as_file

Assets = Mapping[str, Path | bytes]
_OF_A_CLASS = ("auto_map", "added_tokens_decoder", "legacy", "sp_model_kwargs", "tokenizer_file", "vocab_file",
               "merges_file", "slow_tokenizer_class", "from_slow", "add_prefix_space", "spaces_between_special_tokens")
"""Settings of the classes that read other files than tokenizer.json."""


def serving_tokenizer(assets: Assets, folder: Path, *, force: bool, say: Callable[[str], None]) -> dict[str, bytes]:
    """The files that make a serving folder's tokenizer readable for every client, to be put over `assets`: none where
    it has a tokenizer.json, or no tokenizer at all. folder: where the tokenizer's files lie.

    Raises UserError where a tokenizer.json would give other ids than the run was trained with; with `force` that is
    said, and what there is is exported."""
    if JSON in assets or not is_tokenizer(assets):
        return {}
    tokenizer = load_tokenizer(str(folder))
    try:
        raw, found = make_tokenizer_json(tokenizer)
    except UserError as reason:
        _refuse(folder, str(reason), force, say)
        return {}
    if not found.equal:
        _refuse(folder, _differs(found, raw), force, say)
    else:
        say(f"tokenizer.json: made from the tokenizer's files, the same ids on {found.texts:,} texts of many scripts")
    bos = adds_bos(tokenizer.files)
    content = parse_object(raw, JSON)
    own = parse_object(_content(assets[CONFIG]), CONFIG) if CONFIG in assets else {}
    own = {key: value for key, value in own.items() if key not in _OF_A_CLASS and value is not None}
    settings = {**tokenizer_config(tokenizer), **own}  # roles that a class would have known by itself
    # The class that does as tokenizer.json says; all others build what they think that a vocabulary needs.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos, "add_eos_token": False,
                 "clean_up_tokenization_spaces": False}
    if bos and tokenizer.bos_id is not None:
        content["post_processor"] = _begins_with(tokenizer.bos_id, str(tokenizer.piece(tokenizer.bos_id)))
        raw = as_file(content)
    return {JSON: raw, CONFIG: dump(settings)}


def _refuse(folder: Path, reason: str, force: bool, say: Callable[[str], None]) -> None:
    if not force:
        raise UserError(f"{shown(folder)}: {reason}. Clients of the export would read other ids than the model was "
                        "trained with; --force exports it all the same")
    say(f"tokenizer.json: NOT equal to what the model was trained with: {reason}")


def _differs(found: Comparison, raw: bytes) -> str:
    unigram = parse_object(raw, JSON)["model"]["type"] == "Unigram"
    why = " (sentencepiece adds the scores of pieces in float32, and of splits that are equally good takes another)"
    return (f"a tokenizer.json made from the tokenizer's files differs from them on {found.differing:,} of "
            f"{found.texts:,} texts{why if unigram else ''}, first {found.example}")


def _content(item: Path | bytes) -> bytes:
    return item if isinstance(item, bytes) else item.read_bytes()


def _begins_with(number: int, piece: str) -> dict[str, Any]:
    """A post-processor that puts BOS before a text, as the folder's add_bos_token asks for."""
    token = {"SpecialToken": {"id": piece, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": [token, one], "pair": [token, one, token, two],
            "special_tokens": {piece: {"id": piece, "ids": [number], "tokens": [piece]}}}
