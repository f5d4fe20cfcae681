"""What the small JSON files of a tokenizer say: roles, added tokens, and which tokens are special."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.signature import first_bytes, what_it_is
from engine.tokenizer.files import ADDED, CONFIG, JSON, SPECIAL_MAP

Files = Mapping[str, Path]
"""The files of a tokenizer, by name."""


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
        what = what_it_is(first_bytes(path))
        raise UserError(f"{path} is {what}" if what else f"{path} is not JSON that can be read: {str(error)[:200]}"
                        ) from None


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


def _settings(files: Files, name: str) -> dict[str, Any]:
    """The object in a file of this name; an empty one where the tokenizer has none."""
    return read_object(files[name]) if name in files else {}


def named_tokens(files: Files) -> dict[str, str]:
    """bos, eos and pad as text, where one of the files names them."""
    named: dict[str, str] = {}
    for name in (CONFIG, SPECIAL_MAP):
        config = _settings(files, name)
        for role in ("bos", "eos", "pad"):
            text = _content(config.get(f"{role}_token"))
            if text is not None:
                named.setdefault(role, text)
    return named


def special_tokens(files: Files) -> set[str]:
    """The tokens that the files beside a vocabulary call special: by a role (bos_token, unk_token, ..), in a list, or
    by their flag. transformers takes them all for special, whatever tokenizer.json says."""
    found: set[str | None] = set()
    for name in (CONFIG, SPECIAL_MAP):
        config = _settings(files, name)
        found.update(_content(value) for key, value in config.items() if key.endswith("_token"))
        for key in ("additional_special_tokens", "extra_special_tokens"):
            found.update(map(_content, _listed(config.get(key))))
        decoder = config.get("added_tokens_decoder")
        for token in decoder.values() if isinstance(decoder, dict) else ():
            if isinstance(token, dict) and token.get("special") is True:
                found.add(_content(token))
    return {text for text in found if text is not None}


def _listed(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _content(token: Any) -> str | None:
    """The text of a token, which files give as it is or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def adds_bos(files: Files) -> bool:
    """Whether every text begins with BOS, as transformers decides it: by `add_bos_token`, else by tokenizer.json's
    post-processor."""
    said = _settings(files, CONFIG).get("add_bos_token")
    if isinstance(said, bool):
        return said
    try:
        post = _settings(files, JSON).get("post_processor") or {}
        templates = [part.get("single") for part in post.get("processors", [post])]
        return any(template and "SpecialToken" in template[0] for template in templates)
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{files[JSON]}: its post_processor does not say how a text begins: {error!r}") from error


def added_tokens(files: Files, count: int) -> dict[str, int]:
    """Tokens that stand beside a vocabulary of `count`, from added_tokens.json and tokenizer_config.json: text and id.
    Raises UserError."""
    found: dict[str, Any] = _settings(files, ADDED)
    decoder = _settings(files, CONFIG).get("added_tokens_decoder") or {}
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            found[token["content"]] = int(number) if str(number).isdecimal() else number
    where = f"the added tokens in {files[ADDED if ADDED in files else CONFIG].parent}" if found else "no added tokens"
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
