"""Pages of a MediaWiki XML dump (`pages-articles.xml`, plain or compressed) as a stream, in constant memory.

Pages are found by searching bytes, not by an XML parser: text in a dump is escaped, so `<page>` is nothing but a tag.
That is fast, survives a broken page, and lets a worker begin anywhere in the file.
Format: https://www.mediawiki.org/wiki/Help:Export, https://www.mediawiki.org/xml/export-0.11.xsd.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.data.encoding import NOT_OF_ENCODING, holds_no_text
from engine.data.wiki.ranges import BrokenStream, RangeReader, read_range
from engine.data.wiki.site import Site, site_of
from engine.data.wiki.xmltext import unescape
from engine.errors import UserError

MAX_PAGE_BYTES = 16 << 20
"""MediaWiki lets no page grow beyond 2 MiB; a larger element is a page with its history, or hostile."""
_HEAD_BYTES = 1 << 20
_CHUNK = 256 << 10
_OPEN, _CLOSE = b"<page>", b"</page>"
_LAST = re.compile(rb"</mediawiki\s*>")
_TAIL = 1024  # bytes before a dump's end in which _LAST stands
_LOOKBACK = 4 << 20  # bytes of a file in which the stream of bzip2 before its last one begins
_OLD_REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)  # dumps before 2011 lack the element <redirect>


@dataclass(frozen=True)
class Page:
    """One article as its authors wrote it."""

    title: str
    id: int
    wikitext: str


@dataclass(frozen=True)
class Skipped:
    """A page that is no article. `reason` is one of REASONS; `message` says more where the reason is "fault"."""

    reason: str
    title: str = ""
    message: str = ""


REASONS = ("redirect", "namespace", "model", "empty", "fault")
"""Why a page is skipped: it redirects; is outside the main namespace; holds no wikitext (but CSS, JSON ..); has no
text; is not well-formed."""


@dataclass(frozen=True)
class PageFault:
    """A place in a dump where no page could be read. The same for any split of the file into ranges."""

    message: str
    title: str
    """Of the page in question; "" where there is none."""
    stream: int
    """File offset of the compressed stream that it begins in; 0 for a plain file."""
    offset: int
    """Decompressed bytes from that stream's beginning; 0 where the stream itself is at fault."""


def dump_head(path: str | Path, size: int = 4096) -> tuple[bytes, str | None]:
    """A file's first bytes, unpacked, in whatever encoding, and what is wrong with it if it ends before `size` of them
    can be read. Raises UserError when it cannot be opened."""
    return _head(path, size)


def is_dump(path: str | Path, encoding: str = "utf-8") -> bool:
    """Whether a file, decompressed, begins as a MediaWiki dump. Raises UserError when it cannot be opened."""
    head = _head(path, 1024, b"<mediawiki", encoding=encoding)[0].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and b"<mediawiki" in head[:1024]


def read_site(path: str | Path, encoding: str = "utf-8") -> Site:
    """The wiki a dump is of; see `site_of`. Raises UserError."""
    head, _ = _head(path, _HEAD_BYTES, b"</siteinfo>", _OPEN, encoding=encoding)
    try:
        return site_of(head.partition(_OPEN)[0])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _head(path: str | Path, size: int, *marks: bytes, encoding: str = "utf-8") -> tuple[bytes, str | None]:
    """The beginning of a file, decompressed: about `size` bytes, or until one of the marks was read; and why it is
    shorter, where that is a fault."""
    reader = read_range(path, encoding=encoding)
    head, data = b"", b" "
    try:
        while data and len(head) < size and not any(mark in head for mark in marks):
            data = reader.read(min(size, 16 << 10))
            head += data
    except BrokenStream as broken:
        return head, str(broken)
    finally:
        reader.close()
    return head, None


def read_pages(
    path: str | Path, start: int = 0, stop: int | None = None, encoding: str = "utf-8"
) -> Iterator[bytes | PageFault]:
    """The raw pages that begin in bytes [start, stop) of a file, as `raw_pages` gives them. Ranges that cover the file
    give every page once, in order, however it is cut. Raises UserError when the file cannot be opened."""
    reader = read_range(path, start, stop, encoding)
    try:
        yield from _Scanner(reader, lambda: _end_of(path, max(0, start - _LOOKBACK), encoding)).pages()
    finally:
        reader.close()


def _end_of(path: str | Path, start: int, encoding: str) -> bytes:
    """The last bytes of what a file holds from byte `start` on."""
    reader = read_range(path, start, None, encoding)
    tail, data = b"", b" "
    try:
        while data:
            try:
                data = reader.read(_CHUNK)
            except BrokenStream:
                continue  # named by the range that it lies in
            tail = _tail(tail, data)
    finally:
        reader.close()
    return tail


def _tail(before: bytes, data: bytes) -> bytes:
    """The last bytes after `data` was read, without the blanks behind them."""
    return (before + data.rstrip()[-_TAIL:])[-_TAIL:]


def raw_pages(stream: BinaryIO | RangeReader) -> Iterator[bytes | PageFault]:
    """The `<page>...</page>` elements of a stream, or of a range those that begin in it.

    A page larger than MAX_PAGE_BYTES, one without an end, broken compressed data and a dump without its end come as a
    PageFault; what follows is read on."""
    return _Scanner(stream).pages()


class _Scanner:
    """Searches a stream, holding no more of it than a page. Positions count decompressed bytes since the first read."""

    def __init__(self, stream: BinaryIO | RangeReader, end_of_file: Callable[[], bytes] = bytes) -> None:
        """end_of_file: the file's last bytes, for a range that holds too few of them."""
        self._stream, self._end_of_file = stream, end_of_file
        self._held = bytearray()
        self._base = 0  # position of the first byte held
        self._end: int | None = None  # position at which the range ends, once known
        self._streams = deque([(-getattr(stream, "skipped", 0), getattr(stream, "stream", 0))])  # position, file offset
        self._tail = b""  # the last bytes read
        self._is_past, self._has_failed = False, False  # whether they lie beyond the range; whether a fault came next

    def pages(self) -> Iterator[bytes | PageFault]:
        while True:
            page = False
            try:
                page = self._seek_page()
                if not page:
                    break
                yield self._take_page()
            except BrokenStream as broken:
                if page:
                    yield self._fault(f"the page is cut short: {broken}")
                self._drop(len(self._held))
                if broken.own:
                    yield PageFault(str(broken), "", broken.stream, 0)
        if (fault := self._cut_short()) is not None:
            yield fault

    def _read(self) -> bool:
        """Holds more bytes; False at the end."""
        try:
            data = self._stream.read(_CHUNK)
        except BrokenStream:
            self._has_failed = True
            raise
        if data:
            self._tail, self._has_failed = _tail(self._tail, data), False
            self._is_past = getattr(self._stream, "past_end", False)
        position, offset = self._base + len(self._held), getattr(self._stream, "stream", 0)
        if offset != self._streams[-1][1]:
            self._streams.append((position, offset))
        if self._end is None and getattr(self._stream, "past_end", False):
            self._end = position
        self._held += data
        return bool(data)

    def _drop(self, count: int) -> None:
        del self._held[:count]
        self._base += count

    def _cut_short(self) -> PageFault | None:
        """The fault of a dump that ends without its last tag: a file cut between two pages shows no other. Only the
        range that has read the file's last bytes, and they were its own, tells of it; and not where a broken stream
        was told of already."""
        seen = self._base + len(self._held)
        if not seen or self._is_past or self._has_failed or _LAST.search(self._tail):
            return None
        if len(self._tail) < _TAIL and _LAST.search(self._end_of_file()):
            return None  # the tag begins in an earlier range
        position, offset = self._streams[-1]
        return PageFault("the dump is cut short: there is no </mediawiki> at its end, and pages that stood behind this "
                         "place are lost", "", offset, seen - position)

    def _seek_page(self) -> bool:
        """Drops what precedes the next page; False when no other begins in the range."""
        while (found := self._held.find(_OPEN)) < 0:
            self._drop(max(0, len(self._held) - len(_OPEN) + 1))
            # A tag may begin in the range and end beyond it.
            if self._end is not None and self._base >= self._end or not self._read():
                return False
        self._drop(found)
        return self._end is None or self._base < self._end

    def _take_page(self) -> bytes | PageFault:
        """The page that the held bytes begin with, removed from them."""
        searched = 0
        while (found := self._held.find(_CLOSE, searched)) < 0:
            searched = max(0, len(self._held) - len(_CLOSE) + 1)
            if len(self._held) > MAX_PAGE_BYTES:
                return self._skip_large()
            if not self._read():
                fault = self._fault("the page has no end: the dump is cut short within it")
                self._drop(len(self._held))
                return fault
        inner = self._held.rfind(_OPEN, 1, found)
        if inner > 0:
            fault = self._fault("the page has no end: another begins in it")
            self._drop(inner)
            return fault
        size = found + len(_CLOSE)
        if size > MAX_PAGE_BYTES:
            return self._skip_large()
        page = bytes(self._held[:size])
        self._drop(size)
        return page

    def _skip_large(self) -> PageFault:
        """Drops a page of any size."""
        fault = self._fault(f"the page is larger than {MAX_PAGE_BYTES:,} bytes")
        while (found := self._held.find(_CLOSE)) < 0:
            self._drop(max(0, len(self._held) - len(_CLOSE) + 1))
            if not self._read():
                self._drop(len(self._held))
                return fault
        self._drop(found + len(_CLOSE))
        return fault

    def _fault(self, message: str) -> PageFault:
        """A fault at the first byte held."""
        while len(self._streams) > 1 and self._streams[1][0] <= self._base:
            self._streams.popleft()
        position, offset = self._streams[0]
        title = _between(bytes(self._held[:4096]), b"<title>", b"</title>").decode("utf-8", "replace")
        return PageFault(message, unescape(title), offset, self._base - position)


def _between(raw: bytes, before: bytes, after: bytes) -> bytes:
    """What stands between two marks; b"" where one of them is missing."""
    start = raw.find(before)
    end = raw.find(after, start)
    return raw[start + len(before) : end] if 0 <= start <= end else b""


def parse_page(raw: bytes, site: Site) -> Page | Skipped:
    """An article of the main namespace with its newest text, or why the page is none. Raises nothing."""
    if b"<!" in raw:
        return Skipped("fault", message="the page holds a declaration or CDATA section (<!), which no dump has")
    try:
        title = unescape(_between(raw, b"<title>", b"</title>").decode()).strip()
    except UnicodeDecodeError as error:
        what = NOT_OF_ENCODING if holds_no_text(raw) else f"the title is not UTF-8 ({error.reason})"
        return Skipped("fault", message=what)
    head = raw[: max(0, raw.find(b"<revision"))]
    number, namespace = _between(head, b"<id>", b"</id>"), _between(head, b"<ns>", b"</ns>")
    if not title or not number.isdigit() or len(number) > 18:
        return Skipped("fault", title, "the page lacks <title>, <id> or <revision>")
    if namespace.strip() != b"0" if namespace else site.namespace_of(title) != 0:
        return Skipped("namespace", title)
    if b"<redirect" in head:
        return Skipped("redirect", title)
    start = raw.rfind(b"<text")  # of the last revision: the newest
    model = raw.rfind(b"<model>", 0, max(0, start))
    if model >= 0 and not raw.startswith(b"<model>wikitext<", model):
        return Skipped("model", title)
    return _with_text(raw, start, title, int(number))


def _with_text(raw: bytes, start: int, title: str, number: int) -> Page | Skipped:
    """The page whose element <text> begins at `start`, -1 where there is none."""
    opened = raw.find(b">", start)
    if start < 0 or opened < 0 or raw[opened - 1 : opened] == b"/":
        return Skipped("empty", title)
    closed = raw.find(b"</text>", opened)
    if closed < 0:
        return Skipped("fault", title, "<text> has no end")
    try:
        text = unescape(raw[opened + 1 : closed].decode())
    except UnicodeDecodeError as error:
        if holds_no_text(raw):
            return Skipped("fault", title, NOT_OF_ENCODING)
        byte = raw[opened + 1 + error.start]
        return Skipped("fault", title, f"byte {error.start:,} of the text is not UTF-8 (0x{byte:02x})")
    if _OLD_REDIRECT.match(text):
        return Skipped("redirect", title)
    return Page(title, number, text) if text.strip() else Skipped("empty", title)
