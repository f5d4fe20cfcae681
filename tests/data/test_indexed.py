"""The .bin/.idx pair: equal to Megatron-LM's byte for byte, streamed, atomic, and suspicious of what it reads."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.claim import claim, remove
from engine.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from engine.errors import UserError

HEADER = struct.Struct("<9sQBQQ")


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> None:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.array(document))
        writer.finish()


def megatron_bytes(documents: list[list[int]], code: int, kind: str) -> tuple[bytes, bytes]:
    """The pair as the format's description has it, written the naive way."""
    sizes = [len(document) for document in documents]
    item = struct.calcsize(kind)
    pointers = [sum(sizes[:n]) * item for n in range(len(sizes))]
    idx = HEADER.pack(b"MMIDIDX\0\0", 1, code, len(sizes), len(sizes) + 1)
    idx += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    idx += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return b"".join(struct.pack(f"<{len(d)}{kind}", *d) for d in documents), idx


@pytest.mark.parametrize(("vocab_size", "code", "kind"), [(65499, 8, "H"), (65500, 4, "i")])
def test_bytes_are_those_of_the_format(tmp_path: Path, vocab_size: int, code: int, kind: str) -> None:
    documents = [[1, 2, 3], [65000], [7] * 100]
    write(tmp_path / "c", documents, vocab_size)
    assert ((tmp_path / "c.bin").read_bytes(), (tmp_path / "c.idx").read_bytes()) == megatron_bytes(
        documents, code, kind
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_real_megatron_pair_is_read_and_rewritten_to_equal_bytes(tmp_path: Path) -> None:
    if "TRIAX_DATA" not in os.environ:
        pytest.skip("TRIAX_DATA is not set: no real Megatron-LM pair to read")
    prefix = Path(os.environ["TRIAX_DATA"]) / "megatron" / "meg-gpt2-openwebtext_text_document"
    corpus = IndexedDataset(prefix)
    corpus.verify(50257)
    assert corpus.documents == 1000
    with IndexedWriter(tmp_path / "copy", 50257) as writer:
        writer.add_documents(corpus.tokens, corpus.sizes, np.diff(corpus.document_index))
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == Path(f"{prefix}{suffix}").read_bytes()
    lengths = [len(corpus.document(n)) for n in range(corpus.documents)]
    assert sum(lengths) == len(corpus.tokens)


def test_documents_of_several_sequences_come_back_whole(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", 100) as writer:
        writer.add_documents(np.arange(10), np.array([3, 2, 4, 1]), np.array([2, 1, 1]))
        writer.finish()
    corpus = IndexedDataset(tmp_path / "c")
    corpus.verify(10)
    assert [corpus.document(n).tolist() for n in range(3)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_nothing_is_left_of_an_aborted_or_refused_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token id 100 is outside the vocabulary of 100"), IndexedWriter(
        tmp_path / "c", 100
    ) as writer:
        writer.add_document(np.array([5]))
        writer.add_document(np.array([100]))
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_prefix_exclude_each_other_and_a_dead_one_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "c.partial").mkdir()
    for name in ("lock", "bin"):
        (tmp_path / "c.partial" / name).write_bytes(b"left by a killed run")
    with IndexedWriter(tmp_path / "c", 100) as writer:
        with pytest.raises(UserError, match="another run is writing"):
            IndexedWriter(tmp_path / "c", 100)
        writer.add_document(np.array([1]))
        writer.finish({"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]


@pytest.mark.parametrize("suffix", [".partial", ".work"])
def test_a_folder_that_no_run_made_is_left_alone(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / f"c{suffix}"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=f"c{suffix} is where a run does its work, and holds other files"):
        claim(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_lock_taken_from_a_run_as_it_ends_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder goes between the opening and the locking of its lock."""
    real = fcntl.flock

    def late(file: Any, how: int) -> None:
        remove(tmp_path / "c.work")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another run is writing"):
        claim(tmp_path / "c.work")


def test_more_than_four_gigabytes_and_two_to_the_31_tokens(tmp_path: Path) -> None:
    """A sparse .bin: three documents of 1.5e9 tokens each; the last token is really there."""
    size, item = 1_500_000_000, 2
    idx = HEADER.pack(b"MMIDIDX\0\0", 1, 8, 3, 4) + struct.pack("<3i", *[size] * 3)
    idx += struct.pack("<3q", 0, size * item, 2 * size * item) + struct.pack("<4q", 0, 1, 2, 3)
    (tmp_path / "big.idx").write_bytes(idx)
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(3 * size * item)
        file.seek(3 * size * item - 2)
        file.write(struct.pack("<H", 4242))
    corpus = IndexedDataset(tmp_path / "big")
    assert len(corpus.tokens) == 4_500_000_000
    assert corpus.token_start(2) == 3_000_000_000
    assert int(corpus.document(2)[-1]) == 4242


def test_writer_computes_offsets_past_four_gigabytes(tmp_path: Path) -> None:
    """The real writer's index with 5e9 bytes described: the sizes are given, the tokens' file is made sparse."""
    with IndexedWriter(tmp_path / "c", 100) as writer:
        writer._sizes.write(np.full(5, 500_000_000, "<i4").data)
        writer._ends.write(np.arange(1, 6, dtype="<i8").data)
        writer._bin.truncate(5_000_000_000)
        writer.sequences = writer.documents = 5
        writer.finish()
    corpus = IndexedDataset(tmp_path / "c")
    assert corpus.pointers.tolist() == [n * 1_000_000_000 for n in range(5)]


def test_opening_reads_the_header_only(tmp_path: Path) -> None:
    """Ten million sequences open without their index being read: the file is sparse and stays so."""
    count = 10_000_000
    with open(tmp_path / "c.idx", "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, count, count + 1))
        file.truncate(HEADER.size + count * 20 + 8)
        file.seek(HEADER.size + count * 20)
        file.write(struct.pack("<q", count))
    (tmp_path / "c.bin").write_bytes(b"")
    assert IndexedDataset(tmp_path / "c").documents == count


def _replace(at: int, kind: str, value: int):  # type: ignore[no-untyped-def]
    def change(idx: bytearray) -> None:
        struct.pack_into(kind, idx, at, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace(0, "<B", 0), "no Megatron-LM index"),
        (_replace(9, "<Q", 2), "version 2"),
        (_replace(17, "<B", 9), "dtype code 9"),
        (_replace(17, "<B", 6), "dtype code 6"),
        (_replace(18, "<Q", 1 << 62), "its counts are wrong"),
        (_replace(26, "<Q", 1 << 62), "its counts are wrong"),
        (_replace(18, "<Q", 3), "its counts are wrong"),
        (_replace(38, "<i", 99), "do not belong together"),
        (_replace(38, "<i", -1), "do not belong together"),
        (_replace(50, "<q", 1 << 60), "do not belong together"),
        (_replace(74, "<q", 7), "document index runs from 0 to 7"),
        (lambda idx: idx.__delitem__(slice(20, None)), "has 20 bytes"),
        (lambda idx: idx.__delitem__(slice(60, None)), "has 60 bytes"),
    ],
)
def test_hostile_index_is_refused_with_file_and_numbers(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "c", [[1, 2, 3], [4, 5]])
    idx = bytearray((tmp_path / "c.idx").read_bytes())
    change(idx)
    (tmp_path / "c.idx").write_bytes(idx)
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(tmp_path / "c")
    assert "c.idx" in str(caught.value)


def test_hostile_middle_entries_are_refused_on_access(tmp_path: Path) -> None:
    write(tmp_path / "c", [[1], [2, 3], [4]])
    original = (tmp_path / "c.idx").read_bytes()
    for at, kind, value in [(54, "<q", 1 << 40), (54, "<q", -2), (54, "<q", 1), (78, "<q", 9), (78, "<q", -1)]:
        idx = bytearray(original)
        struct.pack_into(kind, idx, at, value)
        (tmp_path / "c.idx").write_bytes(idx)
        corpus = IndexedDataset(tmp_path / "c")
        with pytest.raises(UserError):
            corpus.document(1)
        with pytest.raises(UserError):
            corpus.verify()


PIECES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=30), wanted=PIECES, data=st.data())
def test_pieces_and_where_their_documents_begin(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], wanted: list[tuple[float, int]], data: st.DataObject
) -> None:
    """Documents of one sequence or several, empty ones among them, against a search through all."""
    prefix = tmp_path_factory.mktemp("c") / "c"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=len(lengths))))
    per_document = np.diff([0, *cuts, len(lengths)])
    total = sum(lengths)
    with IndexedWriter(prefix, 60000) as writer:
        writer.add_documents(np.arange(total), np.array(lengths), per_document)
        writer.finish()
    corpus = IndexedDataset(prefix)
    starts = np.array([int(share * total) for share, _ in wanted], np.int64)
    sizes = np.array([min(size, total - start) for (_, size), start in zip(wanted, starts, strict=True)], np.int64)
    tokens = corpus.read(starts, sizes)
    expected = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    np.testing.assert_array_equal(tokens, np.concatenate([np.empty(0), *expected]))
    first_tokens = np.cumsum([0, *lengths])[np.cumsum([0, *per_document])[:-1]]  # token i of this corpus is i
    np.testing.assert_array_equal(corpus.begins(starts, sizes), np.isin(tokens, first_tokens))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(54, 1 << 40, f"offset of sequence 2 is 6, and of the one before it {1 << 40}"),
     (54, -2, "offset of sequence 1 is -2, and of the one before it 0"), (54, 1, ""),
     (78, 9, "first sequence of document 2 is 2, and of the one before it 9"),
     (78, -1, "first sequence of document 1 is -1, and of the one before it 0"), (78, 2, "")],
)
def test_hostile_middle_entries_are_refused_by_the_search_for_documents(
    tmp_path: Path, at: int, value: int, message: str
) -> None:
    write(tmp_path / "c", [[1], [2, 3], [4]])
    idx = bytearray((tmp_path / "c.idx").read_bytes())
    struct.pack_into("<q", idx, at, value)
    (tmp_path / "c.idx").write_bytes(idx)
    corpus = IndexedDataset(tmp_path / "c")
    refused = ""
    for start in range(4):
        for size in range(1, 5 - start):
            try:
                assert corpus.begins(np.array([start]), np.array([size])).shape == (size,)
            except UserError as error:
                refused = str(error)
                assert "c.idx" in refused
    assert message in refused


def test_many_documents_without_a_token_begin_where_the_next_one_does(tmp_path: Path) -> None:
    """More of them than are handled at a time."""
    empty = (1 << 20) + 5
    with IndexedWriter(tmp_path / "c", 100) as writer:
        writer.add_documents(np.arange(9), np.array([4, 5]), np.array([1, *[0] * empty, 1]))
        writer.finish()
    corpus = IndexedDataset(tmp_path / "c")
    assert corpus.documents == empty + 2
    assert np.flatnonzero(corpus.begins(np.array([0, 3]), np.array([9, 3]))).tolist() == [0, 4, 10]


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"12")


def _rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # later, however coarse this file system's clock is


def _replace_file(path: Path) -> None:
    fresh = path.with_name("fresh")
    fresh.write_bytes(path.read_bytes())
    os.utime(fresh, ns=(0, path.stat().st_mtime_ns + 1))
    os.replace(fresh, path)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(_cut, "it had [0-9]+ bytes and has [0-9]+ now"), (_append, "it had [0-9]+ bytes and has [0-9]+ now"),
     (_rewrite, "it was last written at .* and is now of"), (_replace_file, "it was last written at .* and is now of"),
     (Path.unlink, "has gone since it was opened")],
)
def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path: Path, suffix: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "c", [[1, 2, 3], [4, 5]])
    corpus = IndexedDataset(tmp_path / "c")
    corpus.check_unchanged()
    change(tmp_path / f"c{suffix}")
    with pytest.raises(UserError, match=message) as caught:
        corpus.check_unchanged()
    assert f"c{suffix}" in str(caught.value)


def test_a_bin_that_is_cut_under_a_reader_is_an_error_not_a_signal(tmp_path: Path) -> None:
    write(tmp_path / "c", [list(range(900))] * 10)
    corpus = IndexedDataset(tmp_path / "c")
    os.truncate(tmp_path / "c.bin", 9000)
    with pytest.raises(UserError, match="c.bin has 9000 bytes, and bytes .* are to be read: it has been cut"):
        corpus.read(np.array([0, 4498]), np.array([5, 5]))


def test_verify_names_an_id_past_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "c", [[1, 999]])
    IndexedDataset(tmp_path / "c").verify(1000)
    with pytest.raises(UserError, match="token id 999 is outside the vocabulary of 999"):
        IndexedDataset(tmp_path / "c").verify(999)


def test_missing_pair_names_the_file_and_unwritable_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.idx does not exist"):
        IndexedDataset(tmp_path / "none")
    with pytest.raises(UserError, match="cannot write to"):
        IndexedWriter(tmp_path / "no" / "such" / "c", 10)


def test_token_dtype_switches_where_megatron_does() -> None:
    assert [token_dtype(size).str for size in (65499, 65500)] == ["<u2", "<i4"]


def test_a_bin_of_half_a_token_more_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", 100) as writer:
        writer.add_documents(np.array([1, 2]), np.array([1, 1]))
        writer.finish()
    raw = bytearray((tmp_path / "c.idx").read_bytes())
    raw[34 + 8 + 8] = 1  # the second sequence's byte offset, in the middle of the first
    (tmp_path / "c.idx").write_bytes(raw)
    (tmp_path / "c.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="do not belong together"):
        IndexedDataset(tmp_path / "c")


def test_a_prefix_too_long_for_a_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        IndexedDataset(tmp_path / ("c" * 300))
