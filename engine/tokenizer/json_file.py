"""What a tokenizer.json asks for: checked before the package `tokenizers` sees it, and whether text may be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError, shown
from engine.tokenizer.bpe import UTF8_BYTES, ByteVocabulary, byte_alphabet
from engine.tokenizer.cut import SPACE
from engine.tokenizer.folder import check_ids, read_object
from engine.tokenizer.patterns import GPT2, LLAMA3, O200K, QWEN2

Json = Mapping[str, Any]
_BYTE_OF = {character: byte for byte, character in byte_alphabet().items()}
_FALLBACK = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""The pieces of bytes; merges that join or make them are not of Llama's kind."""
_READ_ALIKE = (GPT2, LLAMA3, QWEN2, O200K)
"""Patterns that mean the same to the package regex and to the engine in `tokenizers`. In others `{1,3}+` or `$` do not:
to the one the first never gives back what it took, to the other it repeats."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a vocabulary's text may be cut into segments that its model can be given one by one."""

    pattern: str | None = None
    """The pre-tokenizer's pattern, of a byte-level vocabulary; None: spaces are written as U+2581."""
    prefix: str = "never"
    """A space before the text: "never", "always", or "unless" it begins with one."""
    split_spaces: bool = False
    """A piece begins at every U+2581."""
    normalize: bool = False
    """The file's own normalizer has to run first."""


class CannotCut(Exception):
    """Why cutting might change the ids, in words."""


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The file's content. Raises UserError where its ids or merges cannot be used."""
    content = read_object(path)
    model = content.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise UserError(f"{path} is no tokenizer.json that can be read: it holds no vocabulary")
    vocabulary = model["vocab"]
    _check_kinds(path, content)
    if isinstance(vocabulary, dict):
        added = {token["content"]: token["id"] for token in _added(content) if "content" in token and "id" in token}
        check_ids(vocabulary, path)
        check_ids({**added, **vocabulary}, path, distinct=False)  # `tokenizers` gives an added token its own id anyway
        if model.get("type", "BPE") == "BPE":
            _check_merges(path, vocabulary, model)
    return content


def count_ids(content: Json) -> int:
    """The highest id + 1."""
    vocabulary = content["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token.get("id", 0) for token in _added(content))]) + 1


def text_tokens(content: Json) -> list[Json]:
    """Added tokens that are looked for in text, as they are not special."""
    return [token for token in _added(content) if not token.get("special")]


def added_special(content: Json) -> list[str]:
    """Added tokens that are special."""
    return [token["content"] for token in _added(content) if token.get("special") and "content" in token]


def merge_pairs(model: Json) -> list[tuple[str, str]]:
    """The merges, which older files write as "a b" and newer ones as ["a", "b"]."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    return [(one, two) for one, two in pairs]


def byte_vocabulary(model: Json) -> ByteVocabulary:
    """The vocabulary of a byte-level model; what is not written in the alphabet of bytes is part of no text."""
    ids = {_to_bytes(piece): number for piece, number in model["vocab"].items()}
    ranks = {(_to_bytes(one), _to_bytes(two)): rank for rank, (one, two) in enumerate(merge_pairs(model))}
    ids.pop(b"", None)
    ranks = {pair: rank for pair, rank in ranks.items() if all(pair)}
    return ByteVocabulary(ids, ranks, whole_first=bool(model.get("ignore_merges")))


def plan(content: Json) -> Plan:
    """How to cut. Raises CannotCut with the reason where that is not known to keep the ids."""
    model = content["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise CannotCut("unigram scores are not additive over cuts" if kind == "Unigram" else f"the model is {kind}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CannotCut(f"the model has a {name}")
    if len(text_tokens(content)) > 64:
        raise CannotCut(f"{len(text_tokens(content))} added tokens are looked for in text")
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel":
        return _byte_level(content, steps)
    return _spaced(content, steps)


def _spaced(content: Json, steps: list[Json]) -> Plan:
    """Llama's way: a space is U+2581, and one is put before the text."""
    model, normalizers = content["model"], steps_of(content.get("normalizer"), "normalizers")
    if not model.get("byte_fallback") or any(piece not in model["vocab"] for piece in _FALLBACK):
        raise CannotCut("without byte fallback it may join neighbouring unknowns, also across a cut")
    if model.get("ignore_merges"):
        raise CannotCut("it looks whole texts up in the vocabulary")
    if any(piece in _FALLBACK for pair in merge_pairs(model) for piece in (*pair, "".join(pair))):
        raise CannotCut("its merges join fallback bytes")
    replaces = [step for step in normalizers if step.get("type") == "Replace"]
    prepends = [step for step in normalizers if step.get("type") == "Prepend"]
    if not steps and len(replaces) == 1 and len(replaces) + len(prepends) == len(normalizers) < 3:
        replaced = replaces[0].get("pattern") == {"String": " "} and replaces[0].get("content") == SPACE
        if replaced and all(step.get("prepend") == SPACE for step in prepends):
            return Plan(prefix="always" if prepends else "never")
    if not normalizers and len(steps) == 1 and steps[0].get("type") == "Metaspace":
        step = steps[0]
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        if step.get("replacement") == SPACE and scheme in ("always", "first", "never"):
            prefix = "never" if scheme == "never" else "unless"
            return Plan(prefix=prefix, split_spaces=bool(step.get("split", True)))
    raise CannotCut("its normalizer and pre-tokenizer are not of a known kind")


def _byte_level(content: Json, steps: list[Json]) -> Plan:
    """GPT-2's way: pieces by a pattern, written in an alphabet of bytes."""
    last = steps[-1]
    alphabet = byte_alphabet()
    if any(alphabet[byte] not in content["model"]["vocab"] for byte in UTF8_BYTES):
        raise CannotCut("the vocabulary lacks some bytes")
    prefix = "unless" if last.get("add_prefix_space") else "never"
    normalize = content.get("normalizer") is not None
    if len(steps) == 1 and last.get("use_regex", True):
        return Plan(pattern=GPT2, prefix=prefix, normalize=normalize)
    if len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        how = steps[0].get("behavior"), bool(steps[0].get("invert"))
        if pattern in _READ_ALIKE and how in (("Isolated", False), ("Removed", True)) and prefix == "never":
            return Plan(pattern=pattern, normalize=normalize)
    raise CannotCut("its pre-tokenizer's pattern is not among those that both engines are known to read alike")


def steps_of(part: Any, name: str) -> list[Json]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return list(part.get(name) or []) if part.get("type") == "Sequence" else [part]


def _to_bytes(piece: str) -> bytes:
    """An entry as bytes; none for those that are not written in the alphabet of bytes."""
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:
        return b""


def _added(content: Json) -> list[Json]:
    return [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]


def _check_kinds(path: Path, content: Json) -> None:
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise UserError(f"{path}: the added tokens are no list")
    if len(_added(content)) < len(added):
        raise UserError(f"{path}: one of the added tokens is no object")
    for token in _added(content):
        if not isinstance(token.get("content", ""), str):
            raise UserError(f"{path}: the content of an added token is {str(token['content'])[:80]}, not text")
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        for number, row in enumerate(vocabulary):
            if not isinstance(row, list) or not row or not isinstance(row[0], str):
                raise UserError(f"{path}: entry {number} of the vocabulary is no piece with its score: {shown(row)}")
    elif not isinstance(vocabulary, dict):
        raise UserError(f"{path}: the vocabulary is a {type(vocabulary).__name__}, not an object or a list")
    prefix = content["model"].get("continuing_subword_prefix")
    if not isinstance(prefix or "", str):
        raise UserError(f"{path}: the prefix of continuing subwords is {str(prefix)[:80]}, not text")


def _check_merges(path: Path, vocabulary: Json, model: Json) -> None:
    try:
        pairs = merge_pairs(model)
    except (TypeError, ValueError):
        raise UserError(f"{path}: a merge is two pieces, and one of these is not") from None
    prefix = len(model.get("continuing_subword_prefix") or "")
    for number, (one, two) in enumerate(pairs, 1):
        if not isinstance(one, str) or not isinstance(two, str):
            raise UserError(f"{path}: merge {number} joins {one!r} and {two!r}, which are not both text")
        for piece in (one, two, one + two[prefix:]):
            if piece not in vocabulary:
                raise UserError(f"{path}: merge {number} joins {one!r} and {two!r}, but {piece!r} is no entry")
