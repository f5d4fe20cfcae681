"""Pages of dumps: each once for any split of the file, in constant memory, every fault named and nothing hanging."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.wiki import (
    MAX_PAGE_BYTES,
    REASONS,
    Page,
    PageFault,
    Site,
    Skipped,
    bz2_streams,
    is_dump,
    parse_page,
    raw_pages,
    read_pages,
    read_range,
    read_site,
    site_of,
)
from engine.errors import UserError

HEAD = b"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>dewiki</dbname>
    <case>first-letter</case>
    <namespaces>
      <namespace key="-2" case="first-letter">Medium</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie &amp; mehr</namespace>
    </namespaces>
  </siteinfo>
"""
TAIL = b"</mediawiki>\n"


def page(
    number: int, text: str = "text", title: str | None = None, namespace: int | None = 0, extra: str = ""
) -> bytes:
    """One page as a dump writes it; `text` and `title` are XML."""
    ns = "" if namespace is None else f"<ns>{namespace}</ns>\n    "
    return f"""  <page>
    <title>{title or f"Seite {number}"}</title>
    {ns}<id>{number}</id>{extra}
    <revision>
      <id>{number + 1000}</id>
      <contributor><username>Ä</username><id>7</id></contributor>
      <model>wikitext</model>
      <text bytes="9" xml:space="preserve">{text}</text>
    </revision>
  </page>
""".encode()


def dump(pages: int, size: int = 40) -> bytes:
    draw = random.Random(pages)
    return HEAD + b"".join(page(n, f"text {n} " * draw.randrange(size)) for n in range(pages)) + TAIL


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def multistream(data: bytes, cuts: list[int]) -> bytes:
    return b"".join(bz2.compress(piece) for piece in pieces(data, cuts))


def of_ranges(path: Path, cuts: list[int]) -> list[bytes | PageFault]:
    size = path.stat().st_size
    ends = [0, *sorted(cut for cut in cuts if cut < size), size]
    return [item for start, stop in zip(ends, ends[1:], strict=False) for item in read_pages(path, start, stop)]


def test_siteinfo_gives_language_name_and_namespaces_with_the_canonical_ones() -> None:
    site = site_of(HEAD)
    assert (site.language, site.dbname, site.case) == ("de", "dewiki", "first-letter")
    assert site.namespaces[6] == ("Datei", "File", "Image")
    assert site.namespaces[14] == ("Kategorie & mehr", "Category")
    assert site.namespaces[10] == ("Template",)
    assert site.link_kind("datei:Hund.jpg") == site.link_kind("FILE:Hund.jpg") == "file"
    assert site.link_kind("fr:Chien") == "language" and site.link_kind("Medium:a.ogg") == "media"
    assert site.namespace_of("Diskussion:Hund") == 1 and site.namespace_of("Hund: ein Tier") == 0


@pytest.mark.parametrize(("dbname", "language"), [
    ("enwiki", "en"), ("zh_min_nanwiki", "zh-min-nan"), ("frwiktionary", "fr"), ("simplewiki", "simple"),
    ("dewikisource", "de"), ("mywonderfulcorp", "en"), ("", "en"),
])  # fmt: skip
def test_the_language_is_that_of_the_database_where_xml_has_none(dbname: str, language: str) -> None:
    assert site_of(f"<mediawiki><siteinfo><dbname>{dbname}</dbname></siteinfo>".encode()).language == language


def test_a_dump_without_siteinfo_is_of_an_english_wiki() -> None:
    assert site_of(b"<mediawiki>") == Site()


@pytest.mark.parametrize("bomb", [
    b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><mediawiki>', b'<mediawiki><!ENTITY x SYSTEM "/etc/passwd">',
])  # fmt: skip
def test_a_document_type_is_refused(bomb: bytes) -> None:
    with pytest.raises(UserError, match="document type"):
        site_of(bomb)


def test_pages_are_parsed_and_their_xml_is_unescaped_once() -> None:
    raw = page(3, "&lt;b&gt;a &amp;amp; b&lt;/b&gt; &quot;c&quot; &#65;&#x42;&#0; &nbsp; &apos;&#38;lt;", "A &amp; B")
    assert parse_page(raw, Site()) == Page("A & B", 3, "<b>a &amp; b</b> \"c\" AB\ufffd &nbsp; '&lt;")


@pytest.mark.parametrize(("raw", "reason"), [
    (page(1, "#WEITERLEITUNG [[Hund]]", extra='\n    <redirect title="Hund" />'), "redirect"),
    (page(1, "#REDIRECT [[Dog]]"), "redirect"),
    (page(1, namespace=1), "namespace"), (page(1, title="Template:x", namespace=10), "namespace"),
    (page(1, title="Diskussion:x", namespace=None), "namespace"),
    (page(1, title="File:x", namespace=None), "namespace"),
    (page(1).replace(b"wikitext<", b"css<"), "model"), (page(1, "  \n"), "empty"),
    (page(1).replace(b">text</text>", b" />"), "empty"),
    (b"<page><title>a</title><id>1</id><revision></page>", "empty"),
    (page(1).replace(b"text</text>", b"t\xff\xfet</text>"), "fault"), (page(1).replace(b"Seite", b"\xc3"), "fault"),
    (page(1).replace(b"</text>", b""), "fault"), (page(1).replace(b"<id>", b"<ID>"), "fault"),
    (b"<page></page>", "fault"),
    (page(1).replace(b"text</text>", b"<![CDATA[x]]></text>"), "fault"), (page(1, title=" "), "fault"),
    (page(1).replace(b"<id>1</id>", b"<id>" + b"9" * 5000 + b"</id>"), "fault"),
])  # fmt: skip
def test_what_is_no_article_is_skipped_for_a_reason(raw: bytes, reason: str) -> None:
    done = parse_page(raw, site_of(HEAD))
    assert isinstance(done, Skipped) and done.reason == reason and reason in REASONS
    assert bool(done.message) == (reason == "fault")


def test_titles_of_the_main_namespace_may_have_colons_and_the_newest_text_counts() -> None:
    assert isinstance(parse_page(page(1, title="Rex: der Hund", namespace=None), Site()), Page)
    two = page(1, "old").replace(b"  </page>", b"<revision><id>2</id><text>new</text></revision></page>")
    assert parse_page(two, Site()) == Page("Seite 1", 1, "new")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([
    b"<page>", b"</page>", b"<title>", b"</title>", b"<id>", b"1", b"</id>", b"<text", b">", b"<revision>", b"</text>",
    b"\xff", b"<ns>", b"0", b"/", b"<redirect", b"&#", b"x",
])))  # fmt: skip
def test_any_bytes_are_parsed_without_an_error(parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert isinstance(parse_page(data, Site()), Page | Skipped)
    list(raw_pages(io.BytesIO(data)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12_000), max_size=8))
def test_any_ranges_of_a_plain_file_give_each_page_once_in_order(tmp_path_factory: pytest.TempPathFactory,
                                                                 cuts: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "split.xml"
    if not path.exists():
        path.write_bytes(dump(40))
    assert of_ranges(path, cuts) == list(raw_pages(io.BytesIO(dump(40))))


def test_every_single_cut_gives_each_page_once(tmp_path: Path) -> None:
    path, data = tmp_path / "plain.xml", dump(3, 3)
    path.write_bytes(data)
    whole = list(read_pages(path))
    assert [item for item in whole if isinstance(item, bytes)] == whole and len(whole) == 3
    for cut in range(len(data) + 1):
        assert of_ranges(path, [cut]) == whole, cut


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12_000), max_size=12), st.lists(st.integers(0, 6_000), max_size=6))
def test_any_ranges_of_bz2_streams_cut_anywhere_give_each_page_once(
    tmp_path_factory: pytest.TempPathFactory, streams: list[int], cuts: list[int]
) -> None:
    """Streams end within pages and tags, as those of parallel compressors do; some are empty."""
    path, data = tmp_path_factory.getbasetemp() / "split.xml.bz2", dump(40)
    path.write_bytes(multistream(data, streams))
    assert is_dump(path) and read_site(path) == site_of(HEAD)
    assert of_ranges(path, cuts) == list(raw_pages(io.BytesIO(data)))


def test_streams_are_found_by_their_beginnings_and_each_range_takes_its_own(tmp_path: Path) -> None:
    path = tmp_path / "multi.xml.bz2"
    parts = [HEAD, *(page(n) * 3 for n in range(5)), TAIL]
    path.write_bytes(b"".join(map(bz2.compress, parts)))
    streams = bz2_streams(path)
    ends = [sum(len(bz2.compress(part)) for part in parts[:n]) for n in range(len(parts))]
    assert streams == ends
    assert [len(list(read_pages(path, start, start + 1))) for start in streams] == [0, 3, 3, 3, 3, 3, 0]
    assert list(read_pages(path, streams[1] + 1, streams[2])) == []
    reader = read_range(path, streams[1], streams[2])
    assert reader.read(100) == parts[1][:100] and not reader.past_end
    reader.close()


def test_the_magic_of_a_stream_within_data_is_no_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.bz2"
    path.write_bytes(bz2.compress(HEAD) + b"BZh91AY&SY" + b"no stream" * 100)
    assert bz2_streams(path) == [0]


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".zst"])
def test_any_compression_is_known_by_content_and_a_byte_order_mark_is_no_matter(tmp_path: Path, ending: str) -> None:
    data = dump(5)
    path = tmp_path / "no-dump-by-name"
    if ending == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    packed = {"": b"\xef\xbb\xbf" + data, ".gz": gzip.compress(data), ".bz2": bz2.compress(data)}
    path.write_bytes(packed.get(ending, data))
    assert is_dump(path) and read_site(path).language == "de"
    size = path.stat().st_size
    assert list(read_pages(path)) == of_ranges(path, [size // 3, size // 2]) == list(raw_pages(io.BytesIO(dump(5))))


@pytest.mark.parametrize("data", [
    b"", b"{\"text\": \"<mediawiki>\"}", b"<html><body>x", b"BZh9 broken", b"\x1f\x8bbroken",
    b"x" * 2000 + b"<mediawiki", bz2.compress(b"plain text"), dump(1).decode().encode("utf-16"),
])  # fmt: skip
def test_other_files_are_no_dumps(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert not is_dump(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for function in (is_dump, read_site, bz2_streams, lambda path: list(read_pages(path))):
        with pytest.raises(UserError, match="nowhere.xml"):
            function(tmp_path / "nowhere.xml")


def faults(items: list[bytes | PageFault]) -> list[PageFault]:
    return [item for item in items if isinstance(item, PageFault)]


def ids(items: list[bytes | PageFault]) -> list[int]:
    done = [parse_page(item, Site()) for item in items if isinstance(item, bytes)]
    return [item.id for item in done if isinstance(item, Page)]


def test_a_page_without_an_end_is_named_and_the_next_is_read(tmp_path: Path) -> None:
    data = HEAD + page(1) + page(2).replace(b"</page>", b"") + page(3) + page(4)[:-20]
    path = tmp_path / "cut.xml"
    path.write_bytes(data)
    for cuts in ([], [len(HEAD) + 300], list(range(0, len(data), 100))):
        items = of_ranges(path, cuts)
        assert ids(items) == [1, 3]
        first, second, third = faults(items)
        assert (third.offset, third.title) == (len(data), "") and "no </mediawiki>" in third.message
        assert (first.title, first.offset) == ("Seite 2", data.index(b"<page>", data.index(b"Seite 1")))
        assert "another begins" in first.message and second.title == "Seite 4" and "no end" in second.message


def test_a_dump_cut_between_two_pages_is_named_once_for_any_split(tmp_path: Path) -> None:
    path, data = tmp_path / "cut.xml", HEAD + page(1) + page(2)
    for ending in (b"", b"\n\n", TAIL[:-3], HEAD[:30]):
        for content in (data + ending, HEAD + ending):
            path.write_bytes(content)
            whole = list(read_pages(path))
            (fault,) = faults(whole)
            assert fault.offset == len(content) and "cut short: there is no </mediawiki> at its end" in fault.message
            assert ids(whole) == [1, 2] * (b"<page>" in content)
            for step in (1, 7, 100):
                assert of_ranges(path, list(range(0, len(content), step))) == whole
    path.write_bytes(data + b"</mediawiki  >" + b"\n" * 5000)
    assert not faults(of_ranges(path, list(range(0, 8000, 100))))


@pytest.mark.parametrize("pieces_of_end", [[TAIL], [b"</medi", b"awiki>", b"\n"], [b""], [b"</medi"]])
def test_a_packed_dump_cut_between_two_streams_is_named_once_for_any_split(tmp_path: Path,
                                                                           pieces_of_end: list[bytes]) -> None:
    parts = [HEAD, page(1) * 3, page(2), *pieces_of_end]
    is_cut = b"".join(pieces_of_end) in (b"", b"</medi")
    path = tmp_path / "cut.xml.bz2"
    path.write_bytes(b"".join(map(bz2.compress, parts)))
    whole = list(read_pages(path))
    assert len(faults(whole)) == is_cut and len(ids(whole)) == 4
    for cut in range(0, path.stat().st_size, 5):
        assert of_ranges(path, [cut]) == whole
    assert of_ranges(path, list(range(0, path.stat().st_size, 3))) == whole
    path.write_bytes(gzip.compress(b"".join(parts[:2])) + gzip.compress(b"".join(parts[2:])))
    assert [fault.message for fault in faults(list(read_pages(path)))] == [one.message for one in faults(whole)]


def test_a_page_that_is_too_large_is_skipped_in_constant_memory() -> None:
    class Stream(io.RawIOBase):
        """A page of 200 MB between two small ones, made as it is read."""

        def __init__(self) -> None:
            self.parts = iter([HEAD + page(1), page(2)[:-40], *[b"x" * (1 << 20)] * 200, b"</page>", page(3) + TAIL])
            self.held = b""

        def read(self, size: int = -1, /) -> bytes:
            self.held = self.held or next(self.parts, b"")
            data, self.held = self.held[:size], self.held[size:]
            return data

    tracemalloc.start()
    items = list(raw_pages(Stream()))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids(items) == [1, 3]
    assert [(fault.title, f"{MAX_PAGE_BYTES:,}" in fault.message) for fault in faults(items)] == [("Seite 2", True)]
    assert peak < 3 * MAX_PAGE_BYTES


def test_a_compressed_bomb_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.xml.bz2"
    compressor = bz2.BZ2Compressor()
    data = compressor.compress(HEAD + b"<page><title>Bomb</title>")
    for _ in range(64):
        data += compressor.compress(b"\n" * (1 << 20))
    path.write_bytes(data + compressor.compress(b"</page>" + page(5)) + compressor.flush())
    tracemalloc.start()
    items = list(read_pages(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids(items) == [5] and faults(items)[0].title == "Bomb" and peak < 3 * MAX_PAGE_BYTES


def broken_multistream() -> bytes:
    """Six streams of pages that cross their borders; the third is damaged in its middle, the last cut short."""
    noise = random.Random(1)
    text = [f"{n} " + "".join(chr(noise.randrange(97, 123)) for _ in range(4000)) for n in range(60)]
    data = HEAD + b"".join(page(n, text[n]) for n in range(60)) + TAIL
    cuts = [len(data) * n // 6 + 7 for n in range(1, 6)]
    streams = [bytearray(bz2.compress(piece, 1)) for piece in pieces(data, cuts)]
    streams[2][len(streams[2]) // 2] ^= 0xFF
    return b"".join(streams)[:-50]


def test_broken_streams_lose_their_pages_alone_and_are_named_once_for_any_split(tmp_path: Path) -> None:
    path = tmp_path / "broken.xml.bz2"
    path.write_bytes(broken_multistream())
    whole = list(read_pages(path))
    lost = sorted(set(range(60)) - set(ids(whole)))
    assert 5 < len(lost) < 35 and {0, 1, 25, 45} & set(lost) in ({25}, set())
    messages = [fault.message for fault in faults(whole)]
    assert sum("is broken" in message and "page" not in message for message in messages) == 1
    assert sum("cut short" in message for message in messages) >= 1
    size = path.stat().st_size
    for cuts in ([size // 2], list(range(0, size, size // 7)), [*bz2_streams(path)]):
        assert of_ranges(path, cuts) == whole


@pytest.mark.parametrize("package", ["bz2", "gzip", "zstandard"])
def test_a_file_cut_short_at_any_byte_ends_with_a_fault_and_never_hangs(tmp_path: Path, package: str) -> None:
    path, data = tmp_path / "cut", pytest.importorskip(package).compress(dump(30))
    for length in range(20, len(data), max(1, len(data) // 25)):
        path.write_bytes(data[:length])
        items = list(read_pages(path))
        assert faults(items) and "cut short" in faults(items)[-1].message
        is_dump(path), read_site(path)


def test_bytes_flipped_anywhere_never_raise(tmp_path: Path) -> None:
    path, data = tmp_path / "flipped.bz2", multistream(dump(30), [2000, 4000, 6000])
    for position in range(0, len(data), 37):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        whole = list(read_pages(path))
        assert of_ranges(path, [len(data) // 2]) == whole or position < 4


def test_garbage_between_streams_is_reported_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "garbage.bz2"
    path.write_bytes(bz2.compress(HEAD + page(1)) + b"garbage" * 10 + bz2.compress(page(2)) + b"\0" * 9)
    items = list(read_pages(path))
    assert ids(items) == [1, 2] and len(faults(items)) == 2
    for cut in range(0, path.stat().st_size, 11):
        assert of_ranges(path, [cut]) == items


def test_real_dumps_are_read_whole_and_by_ranges(shared_data: Path, tmp_path: Path) -> None:
    counts = {}
    for path in sorted((shared_data / "wiki").glob("*.bz2")):
        site = read_site(path)
        items = list(read_pages(path))
        counts[path.name.split(".")[0]] = Counter(
            "page" if isinstance(done, Page) else done.reason
            for done in (parse_page(item, site) for item in items if isinstance(item, bytes))
        )
        assert is_dump(path) and not faults(items) and bz2_streams(path) == [0]
        data = bz2.decompress(path.read_bytes())
        again = tmp_path / "again.bz2"
        again.write_bytes(multistream(data, list(range(0, len(data), 300_000))))
        size = os.path.getsize(again)
        assert of_ranges(again, [size * n // 5 for n in range(1, 5)]) == items
    assert counts == {
        "de-minidump": {"page": 2}, "en-minidump": {"page": 24, "redirect": 2, "namespace": 1},
        "enwiki-206pages": {"page": 106, "redirect": 99, "namespace": 1}, "enwiki-table-markup": {"page": 5},
        "tiny-2pages": {"page": 1, "namespace": 1}, "zh-minidump": {"page": 1},
    }  # fmt: skip
    assert read_site(shared_data / "wiki" / "tiny-2pages.xml.bz2").language == "fo"
