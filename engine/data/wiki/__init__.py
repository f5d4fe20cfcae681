"""Wikipedia's and Wiktionary's XML dumps as documents.

    site = read_site(path)
    for raw in read_pages(path, start, stop):      # a byte range; ranges that cover the file give each page once
        page = raw if isinstance(raw, PageFault) else parse_page(raw, site)
        if isinstance(page, Page):
            text = article(page, site)             # title and text; None when nothing is left
"""

from engine.data.wiki.dump import (
    MAX_PAGE_BYTES,
    REASONS,
    Page,
    PageFault,
    Skipped,
    dump_head,
    is_dump,
    parse_page,
    raw_pages,
    read_pages,
    read_site,
)
from engine.data.wiki.ranges import bz2_streams, read_range
from engine.data.wiki.site import Site, site_of
from engine.data.wiki.wikitext import article, strip

__all__ = [
    "MAX_PAGE_BYTES",
    "REASONS",
    "Page",
    "PageFault",
    "Site",
    "Skipped",
    "article",
    "bz2_streams",
    "dump_head",
    "is_dump",
    "parse_page",
    "raw_pages",
    "read_pages",
    "read_range",
    "read_site",
    "site_of",
    "strip",
]
