"""Control pieces: the entries of a vocabulary that steer a model and that no text may become.

Every library has its own mark for them ("special" in a tokenizer.json, CONTROL in a sentencepiece model), and files do
not always set it: a chat's <|im_end|> that is `special: false`, or user-defined in sentencepiece, would be found in
what a user types, and would end the turn. So a piece that Triax itself uses is a control piece whatever its file says.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any

CHATML = ("<|im_start|>", "<|im_end|>")
"""The two pieces of ChatML."""
END_OF_TEXT = "<|endoftext|>"
USED = (*CHATML, END_OF_TEXT)
"""What Triax puts between texts by its own hand, besides the bos, eos and pad that a vocabulary names."""
_MARKED = re.compile(r"[<\[{|\uff5c].+[>\]}|\uff5c]", re.DOTALL)

Json = Mapping[str, Any]


def is_marked(piece: str) -> bool:
    """Whether a piece is spelled as no text is: between brackets. Some vocabularies name "!" or a newline as their pad;
    these are text and stay it."""
    return _MARKED.fullmatch(piece) is not None


def control_pieces(*names: Iterable[str]) -> frozenset[str]:
    """Of these names and of those that Triax uses, the ones that are control pieces."""
    return frozenset(name for group in (USED, *names) for name in group if is_marked(name))


def with_special(content: Json, control: Collection[str]) -> Json:
    """A tokenizer.json in which the control pieces it holds are special tokens: `tokenizers` then finds none of them in
    text, and decodes them to nothing. Ids stay. `content` itself where nothing is to be changed."""
    vocabulary = content["model"]["vocab"]
    ids = vocabulary if isinstance(vocabulary, dict) else {row[0]: number for number, row in enumerate(vocabulary)}
    missing = {piece: ids[piece] for piece in sorted(control) if piece in ids}
    tokens = []
    for token in content.get("added_tokens") or []:
        if isinstance(token, dict) and token.get("content") in control:
            missing.pop(token["content"], None)
            token = {**token, "special": True}
        tokens.append(token)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens += [{"id": number, "content": piece, **flags} for piece, number in missing.items()]
    return {**content, "added_tokens": tokens} if tokens != (content.get("added_tokens") or []) else content


def without_names(content: Json, control: Collection[str]) -> dict[str, Any] | None:
    """The same tokenizer.json for encoding only, its control pieces under names that no text holds; None where its
    model makes none of them from text anyway.

    Being special is not enough where the model itself may spell a piece: a unigram model takes "</s>" whole, as one of
    its entries, and so does a table of words. Renaming keeps every id, score and rank."""
    model = content["model"]
    vocabulary = model["vocab"]
    held = vocabulary if isinstance(vocabulary, dict) else {row[0] for row in vocabulary}
    names = {piece: f"\0{secrets.token_hex(16)}\0" for piece in control if piece in held}
    merges = model.get("merges") or []
    kept = [merge for merge in merges if not _concerns(merge, names)]
    merging = model.get("type", "BPE") == "BPE" and not model.get("ignore_merges")
    if not names or (merging and len(kept) == len(merges)):
        return None
    changed: dict[str, Any] = {**model}
    if isinstance(vocabulary, dict):
        changed["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        changed["vocab"] = [[names.get(row[0], row[0]), *row[1:]] for row in vocabulary]
    if "merges" in model:
        changed["merges"] = kept
    if isinstance(model.get("unk_token"), str):
        changed["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    tokens = [
        {**token, "content": names[token["content"]]} if token.get("content") in names else token
        for token in content.get("added_tokens") or []
    ]
    return {**content, "model": changed, "added_tokens": tokens, "post_processor": None}


def _concerns(merge: Any, names: Collection[str]) -> bool:
    """Whether a merge, "a b" or ["a", "b"], makes or takes one of these pieces."""
    one, two = merge.split(" ") if isinstance(merge, str) else merge
    return one + two in names or one in names or two in names
