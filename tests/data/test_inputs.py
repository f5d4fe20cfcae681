"""Inputs of every kind: what is found, how it is cut, and that cutting changes nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.encoding import AsUtf8
from engine.data.inputs import (
    Document,
    Fault,
    LeftOut,
    ReadOptions,
    Source,
    Span,
    find_sources,
    items,
    plan,
    read_span,
    text,
    unit_bytes_of,
)
from engine.data.inputs.read import open_meter
from engine.errors import UserError
from engine.tokenizer.sample import SampleSettings, draw_sample

Items = list[Document | Fault | LeftOut]
ROWS = [f"row {n} äöü 中文 {'x' * (n * 7 % 40)}" for n in range(60)]


def read(source: Source, options: ReadOptions, unit_bytes: int = 1 << 20, block_bytes: int = 1 << 20) -> Items:
    """Everything in a file, read span by span; lines are those of the file."""
    found: Items = []
    lines = 0
    for unit in plan([source], options.split_text, unit_bytes):
        for span in unit:
            with open_meter(source, span.start, span.stop, options, block_bytes) as meter:
                for item in read_span(source, meter, options):
                    found.append(item._replace(line=lines + item.line) if source.has_lines else item)
            lines += meter.newlines
    return found


def texts(path: Path, unit_bytes: int = 1 << 20, encoding: str = "utf-8", **options: str) -> list[str]:
    """The documents of a file that must hold no fault."""
    found = read(find_sources([str(path)], encoding)[0], ReadOptions(**options), unit_bytes)
    assert not [item for item in found if isinstance(item, Fault)]
    return [item.text for item in found if isinstance(item, Document)]


def faults(path: Path, **options: str) -> list[Fault]:
    return [item for item in read(find_sources([str(path)])[0], ReadOptions(**options)) if isinstance(item, Fault)]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)  # type: ignore[no-any-return]


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip


# --- which files


def test_folders_and_patterns_give_their_files_sorted_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", ".hidden.txt", "deep/c.md.gz", ".git/d.txt", "notes.pdf", "deep/.e.txt"):
        put(tmp_path / name, gzip.compress(b"") if name.endswith(".gz") else b"")
    names = [os.path.relpath(source.path, tmp_path) for source in find_sources([str(tmp_path)])]
    assert names == ["a.txt", "b.jsonl", "deep/c.md.gz"]
    found = find_sources([str(tmp_path / "b.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.gz")])
    assert [Path(source.path).name for source in found] == ["b.jsonl", "a.txt", "c.md.gz"]


def test_what_cannot_be_input_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "a")
    put(tmp_path / "a.pdf", "a")
    put(tmp_path / "a.xml", "<html>")
    put(tmp_path / "a.parquet.gz", "a")
    put(tmp_path / "p.bin", "a"), put(tmp_path / "p.idx", "a"), put(tmp_path / "q.bin", "a")
    (tmp_path / "empty").mkdir()
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)  # opening it would wait for ever
    for given_, message in [
        ([tmp_path / "none.txt"], "cannot read"),
        ([tmp_path / "*.csv"], "no file matches"),
        ([tmp_path / "empty"], "holds no file that can be read"),
        ([tmp_path / "a.pdf"], "ends in .pdf; known are .jsonl"),
        ([tmp_path / "p.bin"], r"p.bin is of a corpus of token ids already: train on it with --data .*/p, or join it"),
        ([tmp_path / "p.idx"], "p.idx is of a corpus of token ids already"),
        ([tmp_path / "q.bin"], "ends in .bin; known are .jsonl"),
        ([tmp_path / "a.xml"], "not a MediaWiki dump"),
        ([tmp_path / "a.parquet.gz"], "unpack the file first"),
        ([tmp_path / "a.txt", tmp_path / "a.txt"], "given twice"),
        ([put(tmp_path / "d.xml", "<!DOCTYPE a><mediawiki>")], "d.xml: the XML declares a document type"),
        ([pipe], "is no file that can be read twice"),
        ([put(tmp_path / "two\nlines.txt", "a")], r"two\\nlines.txt has control characters in its name"),
        ([put(tmp_path / "le.txt", "text".encode("utf-16-le"))], "looks like UTF-16 .* say --encoding utf-16-le"),
        ([put(tmp_path / "be.jsonl", "text".encode("utf-16-be"))], "looks like UTF-16"),
    ]:
        with pytest.raises(UserError, match=message):
            find_sources([str(path) for path in given_])
    with pytest.raises(UserError, match="unknown --encoding utf-88; did you mean utf-8"):
        find_sources([str(tmp_path / "a.txt")], "utf-88")
    for codec in ("base64", "rot13", "undefined", "idna", "no\nsuch"):
        with pytest.raises(UserError, match="unknown --encoding"):
            find_sources([str(tmp_path / "a.txt")], codec)


def test_links_to_folders_are_followed_and_a_folder_is_gone_through_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "b.txt", "b")
    put(tmp_path / "in" / "a.txt", "a")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self.txt").symlink_to("self.txt")
    found = [os.path.relpath(source.path, tmp_path) for source in find_sources([str(tmp_path / "in")])]
    assert found == ["in/a.txt", "in/linked/b.txt"]


# --- units


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(["jsonl", "text", "json"])), min_size=1, max_size=12),
       st.integers(8, 1500))  # of fewer bytes there would be more units than there may be, and they grow
def test_units_cover_every_byte_once_and_in_order(files: list[tuple[int, str]], unit_bytes: int) -> None:
    sources = [Source(str(n), kind, "", "utf-8", size, 0) for n, (size, kind) in enumerate(files)]
    units = plan(sources, "line", unit_bytes)
    spans = [span for unit in units for span in unit]
    expected: list[Span] = []
    for number, source in enumerate(sources):
        mine = [span for span in spans if span.source == number]
        assert mine[0].start == 0 and mine[-1].stop == source.size
        assert all(one.stop == two.start for one, two in zip(mine, mine[1:], strict=False))
        expected += mine
    assert spans == expected
    assert all(len(unit) == 1 or sum(span.stop - span.start for span in unit) <= unit_bytes for unit in units)


def test_the_number_of_units_is_bounded_for_any_corpus() -> None:
    sources = [Source(str(n), "jsonl", "", "utf-8", 1 << 40, 0) for n in range(3)]
    units = plan(sources, "document")
    assert len(units) < 8200 and all(unit[0].start % (16 << 20) == 0 for unit in units)


@pytest.mark.parametrize(("total", "megabytes"), [(0, 2), (10**8, 2), (6 * 10**8, 8), (1 << 30, 16), (1 << 50, 16)])
def test_units_are_smaller_where_they_would_be_too_few_to_share_out(total: int, megabytes: int) -> None:
    assert unit_bytes_of(total) == megabytes << 20


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "bb bb", "", " \t", "\f", "中", "x" * 30]), max_size=25),
    st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 60), st.sampled_from(["line", "blank"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)  # fmt: skip
def test_text_cut_anywhere_gives_the_same_documents_and_lines(
    parts: list[str], end: str, ended: bool, unit_bytes: int, split_text: str, mark: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder) / "a.txt", mark + (end.join(parts) + (end if ended else "")).encode())
        source, options = find_sources([str(path)])[0], ReadOptions(split_text=split_text)
        whole = read(source, options)
        assert read(source, options, max(unit_bytes, 3)) == whole
        for item in whole:
            assert isinstance(item, Document)
            assert item.text.split("\n")[0] == (parts or [""])[item.line - 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 400))
def test_jsonl_cut_anywhere_gives_the_same_rows_and_faults(unit_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"text": row}) for row in ROWS]
        lines[20], lines[40] = "", '{"text": '
        path = put(Path(folder) / "a.jsonl", "\n".join(lines))
        found = read(find_sources([str(path)])[0], ReadOptions(), unit_bytes)
        assert [(item.line, item.text) for item in found if isinstance(item, Document)] == [
            (n + 1, row) for n, row in enumerate(ROWS) if n not in (20, 40)
        ]
        assert [item.line for item in found if isinstance(item, Fault)] == [41]


def test_a_line_longer_than_units_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (text, items):
        monkeypatch.setattr(room, "MAX_RECORD_BYTES", 100)
    path = put(tmp_path / "a.txt", "one\n" + "x" * 900 + "\ntwo\nthree")
    for split_text, documents in (("line", ["one", "two", "three"]), ("blank", [])):
        for unit_bytes in (50, 101, 1 << 20):
            found = read(find_sources([str(path)])[0], ReadOptions(split_text=split_text), unit_bytes)
            assert [item.text for item in found if isinstance(item, Document)] == documents
            assert len([item for item in found if isinstance(item, Fault) and "longer than 100" in item.message]) == 1


# --- kinds


@pytest.mark.parametrize(
    ("name", "split_text", "long", "count"),
    [
        ("a.jsonl", "document", b"\0", 3),  # the first line, the long one, the last
        ("a.txt", "line", b"\0", 4),  # and the empty one
        ("a.txt", "blank", b"\0", 2),  # the first line and what follows it; the last
        ("a.txt", "blank", b"a" * 1023 + b"\n", 2),
    ],
)
def test_what_is_longer_than_many_spans_is_not_read_through_in_each(
    tmp_path: Path, name: str, split_text: str, long: bytes, count: int
) -> None:
    size, unit_bytes = 48 << 20, 1 << 20
    path = put(tmp_path / name, b'"\n' + long * (size // len(long)) + b'\n\n{"text": "after"}\n')
    source, options = find_sources([str(path)])[0], ReadOptions(split_text=split_text)
    found: Items = []
    through = 0
    for (span,) in plan([source], split_text, unit_bytes):
        with open_meter(source, span.start, span.stop, options, unit_bytes) as meter:
            found += read_span(source, meter, options)
            through += meter.position - span.start
    assert through < 4 * size
    assert len(found) == count and sum("longer than" in str(item) for item in found) == 1
    assert isinstance(found[-1], Document) and "after" in found[-1].text


@pytest.mark.parametrize("ending", PACK)
def test_every_kind_is_read_packed_or_not(tmp_path: Path, ending: str) -> None:
    rows = [{"text": row} for row in ROWS]
    pack = PACK[ending]
    assert texts(put(tmp_path / f"a.jsonl{ending}", pack("\n".join(map(json.dumps, rows)).encode()))) == ROWS
    assert texts(put(tmp_path / f"b.ndjson{ending}", pack("\n".join(map(json.dumps, rows)).encode()))) == ROWS
    assert texts(put(tmp_path / f"c.json{ending}", pack(json.dumps(rows, indent=1).encode()))) == ROWS
    assert texts(put(tmp_path / f"d.json{ending}", pack("\n".join(map(json.dumps, rows)).encode()))) == ROWS
    assert texts(put(tmp_path / f"e.txt{ending}", pack("\n".join(ROWS).encode())), split_text="line") == ROWS
    assert texts(put(tmp_path / f"f.MD{ending}", pack(b"# a\n\nb"))) == ["# a\n\nb"]


def test_packed_files_may_be_several_put_together(tmp_path: Path) -> None:
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        content = PACK[ending](b'{"text": "a"}\n') + PACK[ending](b'{"text": "b"}\n')
        assert texts(put(tmp_path / f"a.jsonl{ending}", content)) == ["a", "b"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_cut_short_or_broken_is_a_fault_after_what_could_be_read(tmp_path: Path, ending: str) -> None:
    content = PACK[ending](b'{"text": "a"}\n' * 3 + os.urandom(5000).hex().encode())
    (cut,) = faults(put(tmp_path / f"cut.jsonl{ending}", content[: len(content) // 2]))
    assert f"file is cut short: it ends within a stream (the file has {len(content) // 2:,} bytes)" in cut.message
    other = bytearray(content)
    other[30:] = b"\xff" * len(other[30:])
    assert "file is broken: " in faults(put(tmp_path / f"other.jsonl{ending}", bytes(other)))[-1].message


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_what_a_packed_file_ends_with_is_not_passed_over(tmp_path: Path, ending: str) -> None:
    one = PACK[ending](b'{"text": "a"}\n')
    for more in (b"no stream", one[:3], one[:-1], b"XX" + one[2:]):
        found = read(find_sources([str(put(tmp_path / f"a.jsonl{ending}", one + more))])[0], ReadOptions())
        assert found[0] == Document(1, "a") and isinstance(found[-1], Fault)
        assert re.search("file is (broken: |cut short: it ends within a stream)", found[-1].message)


def test_zeros_after_gzip_are_what_fills_a_tape(tmp_path: Path) -> None:
    assert texts(put(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n') + bytes(5000))) == ["a"]


def test_bombs_are_read_in_bounded_memory(tmp_path: Path) -> None:
    """128 MB of one line, in a few kilobytes."""
    for ending in (".zst", ".bz2", ".xz"):
        path = put(tmp_path / f"bomb.jsonl{ending}", PACK[ending](bytes(128 << 20)))
        source = find_sources([str(path)])[0]
        tracemalloc.start()
        found = read(source, ReadOptions())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 << 20 and len(found) == 1 and "longer than" in str(found[0])


@pytest.mark.parametrize(
    ("encoding", "given_as"),
    [("utf-16", None), ("utf-32", None), ("utf-8-sig", None), ("utf-16-le", "utf-16-le"), ("gb18030", "gb18030"),
     ("big5", "big5"), ("iso2022_jp", "iso2022_jp")],
)  # fmt: skip
def test_encodings_are_told_by_their_mark_or_by_name(tmp_path: Path, encoding: str, given_as: str | None) -> None:
    rows = ["一中", "日本", "a\\b", "中文"]
    content = "\r\n".join(rows).encode(encoding)
    for ending in ("", ".gz"):
        path = put(tmp_path / f"a.txt{ending}", PACK[ending](content))
        assert texts(path, encoding=given_as or "utf-8", split_text="line", unit_bytes=5) == rows
        array = json.dumps([{"text": row} for row in rows], ensure_ascii=False).encode(encoding)
        path = put(tmp_path / f"b.json{ending}", PACK[ending](array))
        assert texts(path, encoding=given_as or "utf-8") == rows


def test_bytes_that_are_not_of_the_encoding_are_faults(tmp_path: Path) -> None:
    (fault,) = faults(put(tmp_path / "a.txt", b"good\nb\xe4d\ngood"), split_text="line")
    assert fault.line == 2 and "byte 1 of the record is not UTF-8 (0xe4); --encoding names another" in fault.message


@pytest.mark.parametrize(("encoding", "bad"), [("utf-16-le", b"\0\xd8"), ("utf-8", b"\xe4"), ("euc_jp", b"\xff"),
                                               ("iso2022_jp", b"\xff")])  # fmt: skip
def test_bytes_that_are_not_of_the_encoding_lose_their_own_document_alone(
    tmp_path: Path, encoding: str, bad: bytes
) -> None:
    """Also where more than a record is decoded at once."""
    rows = ["one\n", "two b", "d\n", "three\n", "four"]
    one, two, *rest = (row.encode(encoding) for row in rows)
    array = [row.encode(encoding) for row in ('[{"text": "one"},\n{"text": "two", "n": "', '"},\n{"text": "three"}]')]
    for name, content, kept in (("a.txt", one + two + bad + b"".join(rest), ["one", "three", "four"]),
                                ("a.json", bad.join(array), ["one", "three"])):
        source = find_sources([str(put(tmp_path / name, content))], encoding)[0]
        found = read(source, ReadOptions(split_text="line"))
        assert [item.text for item in found if isinstance(item, Document)] == kept
        (fault,) = (item for item in found if isinstance(item, Fault))
        assert fault.line == 2 and re.search(f"encoding|not {encoding}", fault.message)


# --- JSON arrays


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=20), st.sampled_from([None, 0, 2]), st.booleans())
def test_an_array_is_what_json_says_it_is(rows: list[str], indent: int | None, ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row.encode("utf-8", "ignore").decode() for row in rows]
        content = json.dumps([{"text": row, "n": [1.5, None]} for row in rows], indent=indent, ensure_ascii=ascii_only)
        assert texts(put(Path(folder) / "a.json", f" \n{content}\n ")) == rows


def test_an_array_is_read_an_element_at_a_time(tmp_path: Path) -> None:
    """60 MB of array in a few megabytes of memory, also with an element of 8 MB."""
    row = json.dumps({"text": "word " * 2000})
    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ",\n".join([row] * 5000) + ", " + json.dumps({"text": "y" * (8 << 20)}) + "]")
    source = find_sources([str(tmp_path / "a.json")])[0]
    tracemalloc.start()
    with open_meter(source, 0, source.size, ReadOptions(), 1 << 20) as meter:
        count = sum(isinstance(item, Document) for item in read_span(source, meter, ReadOptions()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5001 and peak < 64 << 20


@pytest.mark.parametrize(
    ("content", "documents", "line", "message"),
    [
        ('[{"text": "a"}, {"text": "b"]', 1, 1, "not JSON"),
        ('[{"text": "a"},\n5,\n{"text": "b"}]', 2, 2, "a number, not an object"),
        ('[{"text": "a"},\n{"text": "\\ud800"}]', 1, 2, "lone surrogate"),
        ('[{"text": "a"},\n]', 1, 2, "not JSON"),
        ('[{"text": "a"}\n', 1, 2, "the file ends within the array"),
        ('[{"text": "a"}]\nx', 1, 2, "more text after the array's end"),
        ("[" * 100_000, 0, 1, "not JSON"),
        ('[{"text": "a"},\n' + "9" * 10_000 + "]", 1, 2, "a number, not an object"),
    ],
)
def test_a_broken_array_is_named_with_its_line(
    tmp_path: Path, content: str, documents: int, line: int, message: str
) -> None:
    found = read(find_sources([str(put(tmp_path / "a.json", content))])[0], ReadOptions())
    (fault,) = [item for item in found if isinstance(item, Fault)]
    assert (fault.line, len(found) - 1) == (line, documents) and message in fault.message


def test_a_number_of_any_length_beside_a_text_is_of_no_account(tmp_path: Path) -> None:
    content = '[{"text": "a"}, {"text": "b", "n": ' + "9" * 10_000 + '}, {"text": "c"}]'
    assert texts(put(tmp_path / "a.json", content)) == ["a", "b", "c"]


def test_small_elements_after_a_large_one_take_no_longer(tmp_path: Path) -> None:
    """The lines before each were counted from the beginning of all that was held: minutes."""
    rows = ["x" * (8 << 20), *(f"{n}" for n in range(100_000))]
    path = put(tmp_path / "a.json", "[" + ",\n".join(f'{{"text": "{row}"}}' for row in rows) + ",\n1]")
    found = read(find_sources([str(path)])[0], ReadOptions())
    assert [item.line for item in found] == list(range(1, len(rows) + 2)) and isinstance(found[-1], Fault)


def test_a_long_run_of_blanks_is_not_walked_through_from_every_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a.txt", "a\n" + " " * (8 << 20) + "\nb\n\nc")
    read_back, options = [0], ReadOptions(split_text="blank")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read_back.append(size) or real(file, size, at))
    found = read(find_sources([str(path)])[0], options, 1 << 16)
    assert [item.text for item in found if isinstance(item, Document)] == ["a", "b", "c"]
    assert sum(read_back) < 3 * (8 << 20)


def test_files_that_each_began_with_a_mark_may_be_put_together(tmp_path: Path) -> None:
    assert texts(put(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n\ufeff')) == ["a", "b"]


def test_a_list_of_texts_is_a_text_of_lines(tmp_path: Path) -> None:
    """Poems are kept so."""
    content = json.dumps([{"title": "t", "paragraphs": ["one,", "two."]}])
    assert texts(put(tmp_path / "a.json", content), json_key="paragraphs") == ["one,\ntwo."]


# --- parquet


def parquet(path: Path, columns: dict[str, list[object]], rows_a_group: int = 10, store_schema: bool = True) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.table(columns), path, row_group_size=rows_a_group, store_schema=store_schema)
    return path


@pytest.mark.parametrize("unit_bytes", [50, 700, 1 << 20])
def test_parquet_is_read_by_row_groups(tmp_path: Path, unit_bytes: int) -> None:
    path = parquet(tmp_path / "a.parquet", {"id": list(range(60)), "text": [*ROWS[:30], None, *ROWS[31:]]})
    found = read(find_sources([str(path)])[0], ReadOptions(), unit_bytes)
    assert found == [Document(n + 1, "" if n == 30 else row) for n, row in enumerate(ROWS)]


def test_parquet_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"body": ["a"], "n": [1]})
    (fault,) = faults(path)
    assert 'no column "text"; the file has body, n' in fault.message
    assert 'column "n" is int64, not text' in faults(path, json_key="n")[0].message
    content = path.read_bytes()
    (fault,) = faults(put(tmp_path / "b.parquet", content[:60] + bytes(len(content) - 64) + b"PAR1"))
    assert "pyarrow" in fault.message
    with pytest.raises(UserError, match="b.parquet is cut short: .* and its 100 bytes do not end as one"):
        faults(put(tmp_path / "b.parquet", content[:100]))
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.Table.from_arrays([arrow.array(["a"])] * 2, names=["text", "text"]), path)
    assert '2 columns are named "text"' in faults(path)[0].message


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_text_that_is_there_twice_is_a_fault_and_not_the_last_of_both(tmp_path: Path, ending: str) -> None:
    rows = ['{"text": "lost", "id": 1, "text": "kept"}', '{"id": 1, "id": 2, "text": "b", "c": {"text": 1, "text": 2}}']
    content = f"[{', '.join(rows)}]" if ending == ".json" else "\n".join(rows)
    path = put(tmp_path / f"a{ending}", content)
    found = read(find_sources([str(path)])[0], ReadOptions())
    assert found == [Fault(1, 'the key "text" is there twice'), Document(1 if ending == ".json" else 2, "b")]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    assert texts(parquet(tmp_path / "a.parquet", {"text": arrow.array(ROWS, type=kind)})) == ROWS


def test_rows_that_share_one_long_text_take_the_memory_of_one(tmp_path: Path) -> None:
    """A file of a few hundred bytes; as texts of their own the rows of a batch would be 1 GB."""
    arrow = pytest.importorskip("pyarrow")
    shared = arrow.DictionaryArray.from_arrays(arrow.array([0] * 256, arrow.int32()), arrow.array(["x" * (4 << 20)]))
    path = parquet(tmp_path / "a.parquet", {"text": shared}, rows_a_group=256, store_schema=False)  # as most write
    before = arrow.total_allocated_bytes()
    (source,) = find_sources([str(path)])
    most = count = 0
    for (span,) in plan([source], "document", 1 << 20):
        with open_meter(source, span.start, span.stop, ReadOptions(), 1 << 20) as meter:
            for item in read_span(source, meter, ReadOptions()):
                assert isinstance(item, Document) and len(item.text) == 4 << 20
                most, count = max(most, arrow.total_allocated_bytes() - before), count + 1
    assert count == 256 and most < 100 << 20


# --- dumps


def dump(pages: list[str]) -> list[bytes]:
    """The head of a dump, each page, and its end."""
    head = (
        '<mediawiki xml:lang="en"><siteinfo><dbname>enwiki</dbname><namespaces><namespace key="0" />'
        '<namespace key="10">Template</namespace></namespaces></siteinfo>\n'
    )
    return [head.encode(), *(page.encode() for page in pages), b"</mediawiki>\n"]


def page(number: int, wikitext: str, more: str = "", ns: int = 0) -> str:
    return (
        f"<page><title>Title {number}</title><ns>{ns}</ns><id>{number}</id>{more}<revision><id>1</id>"
        f"<model>wikitext</model><text>{wikitext}</text></revision></page>\n"
    )


PAGES = [page(n, f"A '''bold''' [[word|statement]] about {n}.") for n in range(1, 30)]
PAGES += [page(30, "#REDIRECT [[x]]", '<redirect title="x" />'), page(31, "{{{1}}}", ns=10)]
ARTICLES = [f"Title {n}\n\nA bold statement about {n}." for n in range(1, 30)]


@pytest.mark.parametrize("unit_bytes", [300, 1 << 20])
@pytest.mark.parametrize("kind", ["plain", "whole", "streams"])
def test_a_dump_is_read_page_by_page_however_it_is_packed_and_cut(tmp_path: Path, kind: str, unit_bytes: int) -> None:
    parts = dump(PAGES)
    if kind == "plain":
        path = put(tmp_path / "wiki.xml", b"".join(parts))
    else:
        groups = [b"".join(parts)] if kind == "whole" else [b"".join(parts[n : n + 5]) for n in range(0, len(parts), 5)]
        path = put(tmp_path / "wiki.xml.bz2", b"".join(map(bz2.compress, groups)))
    found = read(find_sources([str(path)])[0], ReadOptions(), unit_bytes)
    assert [" ".join(item.text.split()) for item in found if isinstance(item, Document)] == [
        " ".join(article.split()) for article in ARTICLES
    ]
    assert [item.reason for item in found if isinstance(item, LeftOut)] == ["redirect", "namespace"]


def test_a_broken_page_is_a_fault_with_its_title(tmp_path: Path) -> None:
    parts = dump([PAGES[0], PAGES[1].replace("</page>", ""), PAGES[2]])
    found = read(find_sources([str(put(tmp_path / "wiki.xml", b"".join(parts)))])[0], ReadOptions())
    (fault,) = [item for item in found if isinstance(item, Fault)]
    assert 'page "Title 2"' in fault.message and fault.line == 0
    assert len([item for item in found if isinstance(item, Document)]) >= 1


# --- the rest


def test_one_bad_line_one_surrogate_one_cut_gzip_never_hang(tmp_path: Path) -> None:
    """Others wait for ever on each of these."""
    begun = time.monotonic()
    put(tmp_path / "a.jsonl", b'{"text": "good"}\n{"text": "bad\n')
    put(tmp_path / "b.jsonl", b'{"text": "\\ud800"}\n')
    put(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * 100)[:-9])
    for name, line, message in [("a.jsonl", 2, "not JSON"), ("b.jsonl", 1, "surrogate"), ("c.jsonl.gz", 101, "cut")]:
        with pytest.raises(UserError, match=f"{name}:{line}: .*{message}"):
            draw_sample(SampleSettings(inputs=[str(tmp_path / name)]))
    assert time.monotonic() - begun < 60


def test_the_digest_of_a_file_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": row}) for row in ROWS))
    source, blocks = find_sources([str(path)])[0], []
    for unit_bytes in (200, 400, 1 << 20):
        found: list[str] = []
        for (span,) in plan([source], "document", unit_bytes):
            with open_meter(source, span.start, span.stop, ReadOptions(), 200) as meter:
                assert list(read_span(source, meter, ReadOptions())) is not None
            found += meter.blocks
        blocks.append(found)
    assert blocks[0] == blocks[1] == blocks[2] and len(blocks[0]) == -(-source.size // 200)


def test_an_empty_file_is_no_document_and_no_fault(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        assert texts(put(tmp_path / name, b"")) == []
    assert texts(put(tmp_path / "a.txt", b"")) == [""]


def test_as_utf8_gives_what_the_decoder_gives_in_any_portions() -> None:
    content = "aä中😀\n" * 50
    for size in (1, 3, 1000):
        stream = AsUtf8(io.BytesIO(content.encode("utf-16")), "utf-16")
        out = b""
        while part := stream.read(size):
            out += part
        assert out.decode() == content
