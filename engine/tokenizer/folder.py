"""The files of a tokenizer's folder: which there are, and what the small JSON files among them say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError

CONFIG = "tokenizer_config.json"
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
)


def folder_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files that are in a folder, by name."""
    found = {name: folder / name for name in FILES if (folder / name).is_file()}
    return found | {path.name: path for path in sorted(folder.glob("*.tiktoken"))}


def hash_of(*contents: bytes) -> str:
    """sha256, hex, of contents one after another."""
    return hashlib.sha256(b"".join(contents)).hexdigest()


def read_json(path: Path) -> Any:
    """A JSON file, with or without a byte-order mark. Raises UserError, also where an object has a key twice."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read: {str(error)[:200]}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def named_tokens(folder: Path) -> dict[str, str]:
    """bos, eos and pad as text, where a file in the folder names them."""
    named: dict[str, str] = {}
    for name in (CONFIG, "special_tokens_map.json"):
        config = read_object(folder / name)
        for role in ("bos", "eos", "pad"):
            value = config.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named.setdefault(role, text)
    return named


def added_tokens(folder: Path, count: int) -> dict[str, int]:
    """Tokens that stand beside a vocabulary of `count`, from added_tokens.json and tokenizer_config.json: text and id.
    Raises UserError."""
    found: dict[str, Any] = dict(read_object(folder / "added_tokens.json"))
    decoder = read_object(folder / CONFIG).get("added_tokens_decoder") or {}
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            found[token["content"]] = int(number) if str(number).isdecimal() else number
    where = f"the added tokens in {folder}"
    check_ids(found, where, alone=False)
    check_highest(found, count + len(found), where)
    return found


def check_ids(ids: Mapping[Any, Any], where: object, *, alone: bool = True, distinct: bool = True) -> None:
    """Raises UserError unless ids are whole numbers from 0, each once, and none too high for their number (alone: there
    are no others)."""
    for token, number in ids.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(f"{where}: the id of {token!r} is {number!r}; ids are whole numbers from 0")
    if alone:
        check_highest(ids, len(ids), where)
    if distinct:
        check_distinct(ids, where)


def check_highest(ids: Mapping[Any, int], count: int, where: object) -> None:
    """Raises UserError for ids that, of `count` tokens in all, leave out more than half of the numbers: a model gets a
    row of weights for each."""
    token = max(ids, key=ids.__getitem__, default=None)
    if token is not None and ids[token] >= max(2 * count, 1024):
        raise UserError(f"{where}: the id of {token!r} is {ids[token]:,}, out of range for {count:,} entries")


def check_distinct(ids: Mapping[Any, int], where: object) -> None:
    """Raises UserError naming two tokens that share an id."""
    if len(set(ids.values())) < len(ids):
        owner: dict[int, Any] = {}
        for token, number in ids.items():
            if number in owner:
                raise UserError(f"{where}: {owner[number]!r} and {token!r} have the same id, {number}")
            owner[number] = token
