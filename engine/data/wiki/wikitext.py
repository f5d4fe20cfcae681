"""Wikitext to plain text: `strip`, and `article` for a whole page.

Passes over the text, most of them one call of `re` that works in C, so that the cost is of the markup, not of the
letters: what is not wikitext (comments, nowiki, math), language variants, references, links without nesting, external
links; then what may nest, by counting braces (`nesting`); tables, HTML tags; last the lines (`lines`). Every pass takes
time linear in the text, whatever is in it: a pattern's repetition ends where the next candidate begins, a nested text
is joined at most `nesting.MAX_DEPTH` times.

What comes out: a paragraph is one line, its authors' line breaks gone as on the page; a blank line between
paragraphs and around headings; an item of a list is a line without its mark; no space at a line's end, no runs of
spaces. Dropped are templates but those in `templates`, tables, references, formulas, code blocks, galleries, files
with their captions, categories, links to other languages, and headings with nothing under them. Markup that is not
closed loses its mark alone.

Syntax: https://www.mediawiki.org/wiki/Help:Formatting, /wiki/Help:Links, /wiki/Help:Tables, /wiki/Markup_spec.
"""

from __future__ import annotations

import re

from engine.data.wiki.dump import Page
from engine.data.wiki.gaps import BREAK, MARK, NEW_LINE, close_gaps
from engine.data.wiki.lines import join_lines
from engine.data.wiki.nesting import drop_tables, nesting_of
from engine.data.wiki.opaque import hide_opaque, show_hidden
from engine.data.wiki.site import VARIANT_LANGUAGES, Site
from engine.data.wiki.variants import choose_variants

# Of these three the text of one element ends at the latest where the next begins: no search is done twice.
_REFERENCE = re.compile(r"<ref\b[^<>]*+>(?:(?<=/>)|[^<]*+(?:<(?!/?ref\b)[^<]*+)*+</ref\s*+>)", re.IGNORECASE)
_DROPPED_NAMES = "references|gallery|imagemap|includeonly|indicator|table|poll|quiz|style|script|slideshow"
_DROPPED = re.compile(
    rf"<({_DROPPED_NAMES})\b[^<>]*+>(?:(?<=/>)|[^<]*+(?:<(?!/?\1\b)[^<]*+)*+</\1\s*+>)", re.IGNORECASE
)
_POEM = re.compile(r"<poem\b[^<>]*+>[^<]*+(?:<(?!/?poem\b)[^<]*+)*+</poem\s*+>", re.IGNORECASE)
_NESTED_ELEMENTS = 4  # how deep such elements (tables) are followed

# [[target]] and [[target|label]]; the group is what is shown. With a colon, or nested, they are left to `nesting`.
_LINK = re.compile(r"\[\[(?=[^][{}|:\n]++[]|])(?:[^]|]*+\|)?([^][{}|]++)\]\]")
_EXTERNAL = re.compile(
    r"\[(?:(?:https?|ftps?|ircs?|git|svn|gopher):)?+(?://|(?:mailto|news|tel|urn):)"
    r"""[^\s\[\]<>"]*+[ ]*+([^][\n]*+)\]""",
    re.IGNORECASE,
)
_BLOCK_TAG = re.compile(
    r"</?(?:br|p|div|hr|blockquote|center|li|[uod]l|d[td]|table|t[rdh]|thead|tbody|caption|h[1-6]|poem|gallery|references)"
    r"\b[^<>]*+>",
    re.IGNORECASE,
)
_INLINE_TAG = re.compile(
    r"</?(?:abbr|bd[io]|big|cite|code|data|del|dfn|em|font|ins|kbd|mark|nobr|rb|rp|rt|rtc|ruby|samp|small|span|strike|strong"
    r"|su[bp]|time|tt|var|wbr|section|noinclude|onlyinclude|includeonly|ref|translate|tvar|templatestyles|languages"
    r"|indicator|imagemap|style|script|nowiki|math|[biqsu])\b[^<>]*+>",
    re.IGNORECASE,
)


def article(page: Page, site: Site) -> str | None:
    """The document made of a page: its title on a line, a blank line, its text. None when no text is left."""
    text = strip(page.wikitext, site)
    return f"{page.title}\n\n{text}" if text else None


def strip(wikitext: str, site: Site) -> str:
    """The text that a reader sees, without markup; the module says what is kept. Takes any string, in linear time."""
    text = wikitext.replace("\r\n", "\n").replace("\r", "\n") if "\r" in wikitext else wikitext
    text = text.replace("\t", " ").replace("&nbsp;", " ").replace("&#160;", " ").replace(MARK, "").replace(BREAK, "")
    hidden = False
    if "<" in text:
        text, hidden = hide_opaque(text)
        text = _drop_elements(text)
    has_variants = "-{" in text
    if has_variants:
        text = choose_variants(text, site.language in VARIANT_LANGUAGES)
    text = "".join(_LINK.split(text))
    if "[" in text:
        text = _drop_urls(text)
    text = nesting_of(site).resolve(text)
    if has_variants:  # those that had a template or a link in them
        text = choose_variants(text, site.language in VARIANT_LANGUAGES)
    text = drop_tables(text)
    if "<" in text:
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub(NEW_LINE, text))
    text = text.replace("\n" + NEW_LINE, NEW_LINE)  # it began a line already: no blank one before it
    text = join_lines(close_gaps(text))
    return show_hidden(text) if hidden else text


def _drop_elements(text: str) -> str:
    """Without the elements whose content is no prose."""
    text = _REFERENCE.sub("", text)
    for _ in range(_NESTED_ELEMENTS):
        text, count = _DROPPED.subn(MARK, text)
        if not count:
            break
    return _POEM.sub(lambda match: match[0].replace("\n", NEW_LINE), text)


def _drop_urls(text: str) -> str:
    """[http://host label] as its label."""
    parts = _EXTERNAL.split(text)
    if len(parts) == 1:
        return text
    parts[1::2] = [label or MARK for label in parts[1::2]]
    return "".join(parts)
