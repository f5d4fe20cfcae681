"""Which keys of a row are content. Nothing that a row says is dropped without a word: a key that is not read either
describes the row, or repeats what is read, or holds nothing, or the row is refused and the key is named."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from engine.errors import UserError, shown

DESCRIBING = frozenset(
    "annotator category categories class created date dataset difficulty domain generator guid hash id ids idx index "
    "kind lang language level licence license link locale meta metadata model name origin quality rating score scores "
    "source split src subject subset tag tags task time timestamp topic type uid updated url uuid version".split()
)
"""Names of keys that say where a row comes from, not what is said in it."""
LONGEST_LABEL = 200
"""Characters of a label, unless it is one word (a URL, a hash): a "source" of three pages is content."""
_ENDINGS = frozenset("at category date hash id ids idx index lang language model name score source time type url "
                     "version".split())
_MEDIA = frozenset("audio file image images img media photo picture video".split())
"""An "image_url" is the image."""
_RENDERED = frozenset("chat chat_text formatted formatted_chat formatted_text full_text rendered text".split())
"""Names of keys that hold the whole row once more, as a template writes it. A "context" that happens to hold question
and answer, as an extract does, says more than they do."""
_LISTED = 8


def is_nothing(value: Any) -> bool:
    """Whether a value holds nothing: null, NaN, blank text, or a list or an object of nothing."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_nothing, value))
    return value is None or bool(value != value)  # only NaN differs from itself


def unused_keys(fields: Mapping[str, Any], read: Collection[str], ignored: Collection[str], *, of_row: bool = False,
                whole: Sequence[Any] = ()) -> set[str]:
    """The keys that hold something and are not read, where that loses no content.

    read: keys whose content is used; ignored: those that the user leaves out. Of a row, numbers and true or false
    describe, and so does what repeats `whole`, the values that were read; in a message a number may be a weight.
    Raises UserError that names all others."""
    unused, content = set(), []
    for key, value in fields.items():
        if is_nothing(value):
            continue
        if key in ignored:
            unused.add(key)
        elif key in read or value in ("[]", "{}", "null"):  # tables hold lists as JSON text
            continue
        elif _describes(key, value) or (of_row and (_is_number(value) or _repeats(key, value, whole))):
            unused.add(key)
        else:
            content.append(key)
    if content:
        raise UserError(_refusal(content))
    return unused


def _refusal(keys: list[str]) -> str:
    names = [shown(key, 80) for key in keys[:_LISTED]]
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    quoted = ", ".join(f'"{name}"' for name in names)
    holds, it = ("holds", "it") if len(keys) == 1 else ("hold", "them")
    return (f"{quoted}{more} {holds} content that plain messages have no place for; write {it} into the messages, or "
            f"leave {it} out with --ignore-keys {','.join(names)}")


def _describes(key: str, value: Any) -> bool:
    """Whether a key says where a row comes from, and its value is no longer than that takes."""
    # "imageUrl", "image-url" and "image_url" are one name
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(" ", "_").split("_")
    if re.fullmatch(r"\s*|Unnamed: \d+", key):
        # The number of a row, as pandas writes it; a column that somebody forgot to name holds anything.
        return _is_number(value) or (isinstance(value, str) and re.fullmatch(r"\s*\d+(\.0)?\s*", value) is not None)
    named = "_".join(words) in DESCRIBING or (len(words) > 1 and words[-1] in _ENDINGS and not _MEDIA & set(words))
    return named and _is_label(value)


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_LABEL and "\n" not in value.strip() or _is_word(value)
    if isinstance(value, bytes):
        return len(value) <= LONGEST_LABEL
    if isinstance(value, Mapping):  # "metadata" hides no "reasoning_content"
        return all(is_nothing(inner) or _is_number(inner) or _is_word(inner) or _describes(str(key), inner)
                   for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_label, value))
    return True


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"\s", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _repeats(key: str, value: Any, whole: Sequence[Any]) -> bool:
    """Whether a value says again what is read: it equals it or one of its texts, or is the text of all of them, as
    Alpaca's "text" is."""
    if any(value == part for part in whole):
        return True
    texts = [text.strip() for text in _texts(whole) if text.strip()]
    return isinstance(value, str) and bool(texts) and (
        value.strip() in texts or (key.lower() in _RENDERED and all(text in value for text in texts)))


def _texts(value: Any) -> Iterator[str]:
    """What messages, parts or plain values say."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for key in ("content", "value", "text"):
            yield from _texts(value.get(key))
