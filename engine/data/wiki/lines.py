"""The last pass: lines. Headings, lists, bold and italic, entities, blank lines."""

from __future__ import annotations

import html
import re
from html.entities import html5

from engine.data.wiki.gaps import BREAK, MARK

_SPECIAL = frozenset("=*#:;|-")
_AFTER_DROPPED = MARK + " .,;:"
_QUOTES = re.compile("('{2,})")
_ENTITY = re.compile(r"&(?:#[0-9]{1,8}|#[xX][0-9a-fA-F]{1,7}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_WORD = re.compile(r"\w")
_MAGIC_WORD = re.compile(
    "__(?:NO|FORCE)?TOC__|__NO(?:EDITSECTION|GALLERY|INDEX|TITLECONVERT|CONTENTCONVERT|TC|CC|NEWSECTIONLINK)__|__INDEX__"
    "|__NEWSECTIONLINK__|__HIDDENCAT__|__STATICREDIRECT__|__DISAMBIG__|__EXPECTUNUSEDCATEGORY__|__EXPECTED_UNCONNECTED_PAGE__"
)
_OWN_MAGIC_WORD = re.compile(r"__[^\W\d_]+(?:_[^\W\d_]+)*__\Z")  # in the wiki's language, alone on its line


def join_lines(text: str) -> str:
    """The text of lines of wikitext that have no markup left but a line's own. Lines of a paragraph become one."""
    out: list[str] = []  # texts, before each but the first what separates it from the one before
    headings: list[tuple[int, str]] = []  # without text so far, each of a higher level than the one before
    gap, in_paragraph = "", False
    for raw in text.split("\n"):
        line = raw.strip()
        if raw[:1] == BREAK:
            line = line.lstrip(BREAK).lstrip()
        if not line:
            gap, in_paragraph = (gap if raw else "\n\n"), False
            continue
        plain = line[0] not in _SPECIAL and raw[0] != " "
        level, line = _clean(line)
        if level and line:
            while headings and headings[-1][0] >= level:
                headings.pop()
            headings.append((level, line))
        elif line:
            for _, heading in headings:
                out += ("\n\n", heading)
                gap = "\n\n"
            if plain and in_paragraph and not headings and raw[0] != BREAK:
                gap = "" if _is_han(out[-1][-1]) and _is_han(line[0]) else " "
            headings.clear()
            out += (gap, line)
            gap = "\n"
        in_paragraph = plain and bool(line) and not level
    return "".join(out[1:]).replace(BREAK, "")


def _is_han(character: str) -> bool:
    """Whether it is of a script that puts no spaces between words, where a line break stands for nothing."""
    return "\u2e80" <= character < "\ua4d0" or "\uf900" <= character < "\ufb00" or "\uff00" <= character <= "\uffef"


def _clean(line: str) -> tuple[int, str]:
    """A line's level as a heading, 0 if it is none, and its text."""
    level = 0
    if MARK in line:
        bare = line.lstrip("*#:; ")
        if bare[0] == MARK:  # a list of works: what followed the one dropped is left
            line = bare.lstrip(_AFTER_DROPPED)
        line = line.replace(MARK, "").strip()
        if not _WORD.search(line):
            return 0, ""
    if line[0] in _SPECIAL:
        level, line = _unmarked(line)
    if "''" in line:
        line = _unquoted(line).strip()
    if "&" in line:
        line = _ENTITY.sub(_entity, line).strip()
    if "__" in line:
        line = _without_magic(line)
    while "  " in line:
        line = line.replace("  ", " ")
    return level, line


def _unmarked(line: str) -> tuple[int, str]:
    """A line's level as a heading, 0 if it is none, and its text without the mark."""
    first = line[0]
    if first == "=":
        opening, closing = len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("="))
        level = min(opening, closing, 6)
        if level and len(line) > opening:
            return level, line[level:-level].strip()
        return 0, line
    if first == "|":  # of a table or template that has no beginning
        return 0, ""
    if first == "-":
        return 0, line.lstrip("-").strip() if line.startswith("----") else line
    return 0, line.lstrip("*#:; ").strip()


def _unquoted(line: str) -> str:
    """Without the quotes of bold (three), italic (two) and both (five); where a line's quotes don't match, one of three
    is an apostrophe (l'''homme''), chosen as MediaWiki does."""
    if "'''" not in line:
        return line.replace("''", "")
    parts = _QUOTES.split(line)
    runs = [len(run) for run in parts[1::2]]
    apostrophes = [1 if run == 4 else max(0, run - 5) for run in runs]
    bold = sum(run != 2 for run in runs)
    italic = sum(run == 2 or run >= 5 for run in runs)
    if bold % 2 and italic % 2:
        apostrophes[_apostrophe(parts, runs)] += 1
    parts[1::2] = ["'" * count for count in apostrophes]
    return "".join(parts)


def _apostrophe(parts: list[str], runs: list[int]) -> int:
    """Which run of three holds an apostrophe: the first after a word of one letter, else a longer one, else a space."""
    ranks = {}
    for number, run in enumerate(runs):
        if run in (3, 4):
            before = parts[2 * number]
            ranks[number] = 2 if before[-1:] in (" ", "") else 0 if before[-2:-1] in (" ", "") else 1
    return min(ranks, key=lambda number: ranks[number]) if ranks else 0


def _entity(match: re.Match[str]) -> str:
    text = html.unescape(match[0]) if match[0][1] == "#" else html5.get(match[0][1:], match[0])
    return " " if text in "\n\r\t\xa0" else text.replace(MARK, "")


def _without_magic(line: str) -> str:
    line = _MAGIC_WORD.sub("", line).strip()
    return "" if _OWN_MAGIC_WORD.match(line) and line == line.upper() else line
