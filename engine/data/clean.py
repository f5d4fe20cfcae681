"""Cleaning that changes text, each step by choice: Unicode NFC, control characters, white space.

Steps run in the order control, whitespace, nfc, so that a second pass finds nothing to do: taking out a character can
bring a letter and its mark together, composing them makes no control character and no space. All passes are linear and
run in C; text that needs nothing costs a few scans.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import regex

_LINE_ENDS = ("\r", "\v", "\f", "\x85")
"""Control characters that end a line: a newline stands in their place, since without them words would run together."""

_SEPARATORS = ("\u2028", "\u2029")

# All below U+10000: `re` makes a bitmap of such a set, ten times as fast as a list of ranges.
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # C0, DEL and C1, but tab, newline and what ends a line
    "\u00ad\u2060\ufeff"  # soft hyphen, word joiner, byte-order mark: they only say where a line may break
    "\u206a-\u206f\ufff9-\ufffb"  # deprecated formatting, interlinear annotation
    "\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"  # noncharacters, lone surrogates
)
_FAR_NONCHARACTERS = [chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF)]
_ASCII_CONTROLS = bytes(code for code in range(128) if _CONTROLS.match(chr(code)))

_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SPACE_RUNS = re.compile("  +")
_BLANK_LINES = re.compile("\n\n\n+")

_MARKS = 512
"""More marks in a row than any language has. Putting them in order takes time that grows with their square."""

_MARK_RUNS = regex.compile(r"\p{M}{2,}+")


@dataclass(frozen=True, kw_only=True)
class Cleaner:
    """What to clean. All off leaves text as it is; clean(clean(text)) == clean(text)."""

    nfc: bool = False
    """Unicode normalisation form C: a letter and its marks become one character where there is one. Nothing is lost in
    compatibility forms (fi ligatures, full-width letters stay). Text with 512 marks in a row is left as it is."""

    control: bool = False
    """Takes out control characters (but tab and newline), noncharacters, lone surrogates, byte-order marks, word
    joiners and soft hyphens; carriage returns, vertical tabs, form feeds and U+0085 become newlines. Kept: the joiners
    U+200C and U+200D (emoji, Indic and Persian spelling), the zero-width space U+200B (it separates Thai and Khmer
    words), marks of direction, variation selectors, tags, private use (some old Chinese text stands there)."""

    whitespace: bool = False
    """Every line end (CR LF, CR, VT, FF, U+0085, U+2028, U+2029) becomes a newline and every other space (no-break,
    thin, ideographic) a plain one. Spaces and tabs at a line's end go, as do blank lines at both ends of the text; runs
    of spaces within a line become one, runs of blank lines too. Indentation stays (code and verse are made of it), and
    so do tabs."""

    def __bool__(self) -> bool:
        return self.nfc or self.control or self.whitespace

    def clean(self, text: str) -> str:
        """The text, cleaned as chosen."""
        if self.control:
            text = _without_controls(text)
        if self.whitespace:
            text = _plain_spaces(text)
        return _composed(text) if self.nfc else text


def _without_controls(text: str) -> str:
    text = _newlines(text, _LINE_ENDS)
    if text.isascii():
        return text.encode().translate(None, _ASCII_CONTROLS).decode()
    if not _CONTROLS.search(text) and not any(map(text.__contains__, _FAR_NONCHARACTERS)):
        return text
    for character in _FAR_NONCHARACTERS:
        text = text.replace(character, "")
    return _CONTROLS.sub("", text)


def _newlines(text: str, ends: tuple[str, ...]) -> str:
    if "\r" in text:  # one character is looked for ten times as fast as two
        text = text.replace("\r\n", "\n")
    for end in ends:
        text = text.replace(end, "\n")
    return text


def _plain_spaces(text: str) -> str:
    text = _newlines(text, _LINE_ENDS + _SEPARATORS)
    if not text.isascii():
        text = _SPACES.sub(" ", text)
    if "  " in text:
        text = "\n".join(map(_single_spaces, text.split("\n")))
    lines = [line.rstrip(" \t") for line in text.split("\n")]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def _single_spaces(line: str) -> str:
    if "  " not in line:
        return line
    body = line.lstrip(" \t")
    return line[: len(line) - len(body)] + _SPACE_RUNS.sub(" ", body)


def _composed(text: str) -> str:
    if text.isascii():
        return text
    # A run that long holds two neighbours of this sample: the search of the whole is rarely needed.
    if _MARK_RUNS.search(text[:: _MARKS // 2]):
        if any(run.end() - run.start() >= _MARKS for run in _MARK_RUNS.finditer(text)):
            return text
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)
