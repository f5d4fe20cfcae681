"""What nests: templates, links and tables, matched by counting their braces."""

from __future__ import annotations

import re
from functools import lru_cache

from engine.data.wiki.gaps import MARK
from engine.data.wiki.site import Site
from engine.data.wiki.templates import Arguments, Rule, Templates

MAX_DEPTH = 40
"""MediaWiki's own limit of templates in templates. Deeper ones are dropped: to join them at every depth takes squared
time."""

_TOKEN = re.compile(r"(\{\{|\}\}|\[\[|\]\])")
_OPENER = {"}}": "{{", "]]": "[["}
_TABLE = re.compile(r"\n[ :*#;\0]*+(?:(\{\|)|\|\}(?!\}))")
_UNCLOSED_TABLE_LINE = re.compile(r"\n *+(?:\{\||!)[^\n]*+")
_CACHED_NAMES, _CACHED_LENGTH = 4096, 200
_FUNCTIONS = re.compile(r"\s*(formatnum|lc|uc|lcfirst|ucfirst):", re.IGNORECASE)


class Nesting:
    """Resolves the templates and links of one wiki."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._templates = Templates(site)
        self._rules: dict[str, Rule | None] = {}

    def resolve(self, text: str) -> str:
        """The text with templates and links replaced by what is shown of them; braces without a partner are dropped."""
        pieces = _TOKEN.split(text)
        if len(pieces) == 1:
            return text
        done = self._render(pieces)
        if done is None:
            done = self._render(_balanced(pieces))
            assert done is not None
        return done

    def _render(self, pieces: list[str]) -> str | None:
        """Pieces of text and, at odd places, braces; None when those don't match."""
        out, opener = [pieces[0]], ""
        stack: list[tuple[list[str], str]] = []  # what encloses the current template or link
        for token, tail in zip(pieces[1::2], pieces[2::2], strict=True):
            if token == "{{" or token == "[[":
                stack.append((out, opener))
                out, opener = [tail], token
                continue
            if not token:
                out.append(tail)
                continue
            if opener != _OPENER[token]:
                return None
            inner = out
            out, opener = stack.pop()
            if len(stack) < MAX_DEPTH:
                out.append(self._template(inner) if token == "}}" else self._link("".join(inner)))
            out.append(tail)
        return None if stack else "".join(out)

    def _template(self, inner: list[str]) -> str:
        """What stands for the template with this content."""
        name = inner[0].partition("|")[0]
        rule = self._rules[name] if name in self._rules else self._rule(name)
        if rule is not None:
            text = "".join(inner)
            if ":" in name:
                text = text.replace(":", "|", 1)
            return rule(Arguments(text.partition("|")[2]))
        for piece in inner:
            if "\n==" in piece:  # braces that were closed by another's end: a template has no headings
                return "".join(inner)
        return MARK

    def _rule(self, name: str) -> Rule | None:
        function = _FUNCTIONS.match(name)
        rule = (lambda arguments: arguments[1]) if function else self._templates.rule(name)
        if len(self._rules) >= _CACHED_NAMES:
            self._rules.clear()
        if len(name) <= _CACHED_LENGTH:
            self._rules[name] = rule
        return rule

    def _link(self, text: str) -> str:
        """What is shown of [[text]]."""
        target, bar, label = text.partition("|")
        target = target.strip()
        kind = "text"
        if target.startswith(":"):
            target = target[1:].lstrip()
        elif ":" in target:
            kind = self._site.link_kind(target)
        if kind == "text" or kind == "media":
            if label or (bar and not target):
                return label
            return _piped(target) if bar else target if kind == "text" else MARK
        return text if "\n==" in text else MARK


def _piped(target: str) -> str:
    """What the pipe trick shows of [[target|]]: without namespace, and without (..) or what follows a comma."""
    name = target.rpartition(":")[2].strip()
    bracket = re.match(r"([^(（]*[^(（\s])\s*[(（][^()（）]*[)）]\Z", name)
    return bracket[1] if bracket else name.partition(", ")[0]


def _balanced(pieces: list[str]) -> list[str]:
    """The pieces, braces without a partner blanked. A closing one skips openers of the other kind that have none."""
    pieces = pieces.copy()
    stack: list[int] = []
    waiting = {"{{": 0, "[[": 0}
    for number in range(1, len(pieces), 2):
        token = pieces[number]
        if token in waiting:
            stack.append(number)
            waiting[token] += 1
            continue
        opener = _OPENER[token]
        if not waiting[opener]:
            pieces[number] = ""
            continue
        while pieces[stack[-1]] != opener:
            waiting[pieces[stack[-1]]] -= 1
            pieces[stack.pop()] = ""
        stack.pop()
        waiting[opener] -= 1
    for number in stack:
        pieces[number] = ""
    return pieces


def drop_tables(text: str) -> str:
    """The text without {| .. |} at the beginning of lines. Of a table without an end, and of one without a beginning,
    only the lines that begin as a table's do are lost (here or in `lines`)."""
    if "{|" not in text:
        return text
    text = "\n" + text
    spans: list[tuple[int, int]] = []
    opened: list[int] = []
    for match in _TABLE.finditer(text):
        if match[1]:
            opened.append(match.start())
        elif opened:
            start = opened.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, match.end()))
    out, at = [], 0
    for start, end in spans:
        out.append(text[at:start])
        at = end
    out.append(text[at:])
    text = f"\n{MARK}".join(out)
    if opened:
        text = _UNCLOSED_TABLE_LINE.sub("", text)
    return text[1:]


@lru_cache(maxsize=8)
def nesting_of(site: Site) -> Nesting:
    """The one `Nesting` of a wiki."""
    return Nesting(site)
