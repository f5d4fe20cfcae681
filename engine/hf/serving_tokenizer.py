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
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.control import CHATML
from engine.tokenizer.equal import Comparison, make_tokenizer_json
from engine.tokenizer.files import CONFIG, JSON, MODEL, is_tokenizer
from engine.tokenizer.folder import adds_bos
from engine.tokenizer.sp import SentencePieceTokenizer
from engine.tokenizer.sp_file import UNKNOWN, read_pieces
from engine.tokenizer.train_json import as_file

Assets = Mapping[str, Path | bytes]
_SENTENCEPIECE = "spiece.model"
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
        _refuse(folder, str(reason), force, say, "none is written")
        return _without_json(tokenizer, assets, say)
    if not found.equal:
        _refuse(folder, _differs(found), force, say, "NOT equal to what the model was trained with")
    else:
        say(f"tokenizer.json: made from the tokenizer's files, the same ids on {found.texts:,} texts of many scripts")
    bos = adds_bos(tokenizer.files)
    content = parse_object(raw, JSON)
    settings = _settings(tokenizer, assets)
    # The class that does as tokenizer.json says; all others build what they think that a vocabulary needs.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos, "add_eos_token": False,
                 "clean_up_tokenization_spaces": False}
    if bos and tokenizer.bos_id is not None:
        content["post_processor"] = _begins_with(tokenizer.bos_id, str(tokenizer.piece(tokenizer.bos_id)))
        raw = as_file(content)
    return {JSON: raw, CONFIG: dump(settings)}


def _settings(tokenizer: Tokenizer, assets: Assets) -> dict[str, Any]:
    """tokenizer_config.json for another class: with the roles that a class would have known by itself."""
    own = parse_object(_content(assets[CONFIG]), CONFIG) if CONFIG in assets else {}
    own = {key: value for key, value in own.items() if key not in _OF_A_CLASS and value is not None}
    return {**tokenizer_config(tokenizer), **own}


def _without_json(tokenizer: Tokenizer, assets: Assets, say: Callable[[str], None]) -> dict[str, bytes]:
    """Files that make a folder without a tokenizer.json one that transformers loads, where there is a way."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.vocab_size > tokenizer.pieces:
        say("the tokenizer's own files alone are written: AutoTokenizer may refuse them, or read other ids; encode "
            "with Triax, or with the package that made them")
        return {}
    unknown = next(piece.text for piece in read_pieces(tokenizer.proto()) if piece.kind == UNKNOWN)
    settings = _settings(tokenizer, assets)
    spare = settings.get("eos_token", unknown)
    # The one class of transformers that asks sentencepiece itself, in 4 and 5, and does nothing to text before. A role
    # that the vocabulary does not have would get an id beyond it.
    roles = {"unk_token": unknown, "sep_token": spare} | {
        f"{role}_token": spare for role in ("bos", "eos", "pad") if not settings.get(f"{role}_token")}
    chat = [piece for piece in CHATML if tokenizer.token_id(piece) is not None]
    settings |= {"tokenizer_class": "BertGenerationTokenizer", "additional_special_tokens": chat, **roles}
    say(f"{_SENTENCEPIECE} is written beside {MODEL}: AutoTokenizer loads it where the package sentencepiece is "
        "installed, and encodes by it; pieces of bytes it shows by their names, so decode with sentencepiece or Triax")
    return {_SENTENCEPIECE: tokenizer.proto(), CONFIG: dump(settings)}


def _refuse(folder: Path, reason: str, force: bool, say: Callable[[str], None], verdict: str) -> None:
    if not force:
        raise UserError(f"{shown(folder)}: {reason}. Clients of the export would read other ids than the model was "
                        "trained with; --force exports it all the same")
    say(f"tokenizer.json: {verdict}: {reason}")


def _differs(found: Comparison) -> str:
    why = f": {found.reasons}" if found.reasons else ""
    return (f"a tokenizer.json made from the tokenizer's files differs from them on {found.differing:,} of "
            f"{found.texts:,} texts{why}; first {found.example}")


def _content(item: Path | bytes) -> bytes:
    return item if isinstance(item, bytes) else item.read_bytes()


def _begins_with(number: int, piece: str) -> dict[str, Any]:
    """A post-processor that puts BOS before a text, as the folder's add_bos_token asks for."""
    token = {"SpecialToken": {"id": piece, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": [token, one], "pair": [token, one, token, two],
            "special_tokens": {piece: {"id": piece, "ids": [number], "tokens": [piece]}}}
