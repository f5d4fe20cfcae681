"""What holds no wikitext: comments, nowiki and pre (kept, letter by letter), formulas and code (dropped)."""

from __future__ import annotations

import re

from engine.data.wiki.gaps import MARK, NEW_LINE

_KEPT = ("nowiki", "pre")
_NAMES = _KEPT + tuple(
    "syntaxhighlight source math chem ce score timeline templatedata graph hiero mapframe maplink phonos categorytree"
    " inputbox templatestyles".split()
)
_OPEN = re.compile(rf"<(?:!--|({'|'.join(_NAMES)})\b[^<>]*+>)", re.IGNORECASE)
_END = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in _NAMES}

# Characters that mean something in wikitext, while they mean nothing: Unicode promises that these are no characters.
_MARKUP = "[]{}|'<>=*#:;!-_"
_HIDE = {ord(character): 0xFDD0 + number for number, character in enumerate(_MARKUP)}
_SHOW = {stand_in: character for character, stand_in in _HIDE.items()}
_STAND_IN = re.compile("[\ufdd0-\ufddf]")


def hide_opaque(text: str) -> tuple[str, bool]:
    """The text without such elements, and whether some of it is hidden: `show_hidden` is needed at the end.

    One that isn't closed loses its mark alone; for each kind the text is searched for a missing end once."""
    out: list[str] = []
    at, hidden = 0, False
    unclosed: set[str] = set()
    while match := _OPEN.search(text, at):
        name = (match[1] or "!--").lower()
        out.append(text[at : match.start()])
        at = match.end()
        if match[0].endswith("/>") or name in unclosed:
            continue
        start, end = _close(text, name, at)
        if start < 0:
            unclosed.add(name)
        elif name in _KEPT:
            if not hidden and _STAND_IN.search(text):
                return hide_opaque(_STAND_IN.sub("", text))
            hidden = True
            content = text[at:start].translate(_HIDE)
            if name == "pre":
                content = f"\n{content}\n".replace("\n", NEW_LINE)
            out.append(content)
            at = end
        elif name == "!--":
            # A comment that has a line to itself leaves no blank line.
            at = end + 1 if text[match.start() - 1 : match.start()] == "\n" == text[end : end + 1] else end
        else:
            out.append(MARK)
            at = end
    if not at:
        return text, False
    out.append(text[at:])
    return "".join(out), hidden


def _close(text: str, name: str, at: int) -> tuple[int, int]:
    """Where the end of an element starts and ends; -1 when there is none."""
    if name == "!--":
        start = text.find("-->", at)
        return start, start + 3
    match = _END[name].search(text, at)
    return match.span() if match else (-1, -1)


def show_hidden(text: str) -> str:
    """The hidden characters as they were."""
    return text.translate(_SHOW)
