"""MediaWiki dumps as documents: articles of the main namespace, title and text, without markup."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from engine.data.inputs.items import MAX_RECORD_BYTES, BadRecord, Document, Fault, LeftOut, check_whole
from engine.data.wiki import Page, PageFault, Site, article, parse_page, read_pages, read_site
from engine.errors import shown

_site = lru_cache(maxsize=4)(read_site)


def read_articles(path: str, start: int, stop: int, encoding: str) -> Iterator[Document | Fault | LeftOut]:
    """The articles that begin in bytes [start, stop) of a dump. Raises UserError when it cannot be opened."""
    site = _site(path, encoding)
    for raw in read_pages(path, start, stop, encoding):
        if isinstance(raw, PageFault):
            place = f" of the stream at byte {raw.stream:,}" if raw.stream else ""
            yield Fault(0, f"{_named(raw.title)}{raw.message} (byte {raw.offset:,}{place})")
        else:
            yield _document(raw, site)


def _document(raw: bytes, site: Site) -> Document | Fault | LeftOut:
    page = parse_page(raw, site)
    if not isinstance(page, Page):
        return Fault(0, f"{_named(page.title)}{page.message}") if page.reason == "fault" else LeftOut(0, page.reason)
    text = article(page, site)
    if text is None:
        return LeftOut(0, "empty")
    if len(text) > MAX_RECORD_BYTES:
        return Fault(0, f"{_named(page.title)}the text is longer than {MAX_RECORD_BYTES:,} characters")
    try:
        return Document(0, check_whole(text))
    except BadRecord as error:
        return Fault(0, f"{_named(page.title)}{error}")


def _named(title: str) -> str:
    return f'page "{shown(title)}": ' if title else ""
