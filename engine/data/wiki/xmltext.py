"""Text content of XML: the five entities and numeric references, no others. So no entity can expand to a bomb."""

from __future__ import annotations

import re

_NAMED = {"lt": "<", "gt": ">", "quot": '"', "apos": "'", "amp": "&"}
_REFERENCE = re.compile(r"&(?:(lt|gt|quot|apos|amp)|#(\d{1,8})|#x([0-9A-Fa-f]{1,7}));")


def unescape(text: str) -> str:
    """The text that an XML element's content stands for. An entity XML doesn't define is kept as it is written; a
    number that is no character becomes U+FFFD."""
    if "&" not in text:
        return text
    if "&#" in text:
        return _REFERENCE.sub(_character, text)
    for name, character in _NAMED.items():  # &amp; is last: &amp;lt; is the text &lt;
        text = text.replace(f"&{name};", character)
    return text


def _character(match: re.Match[str]) -> str:
    if match[1]:
        return _NAMED[match[1]]
    number = int(match[2]) if match[2] else int(match[3], 16)
    return chr(number) if 0 < number < 0xD800 or 0xDFFF < number < 0x110000 else "\ufffd"
