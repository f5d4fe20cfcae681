"""Corpora joined by copying, looked at, and shuffled in external memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import combine as room
from engine.data.blend import parse_spec
from engine.data.combine import combine
from engine.data.indexed import IndexedDataset, IndexedWriter, output_prefix
from engine.data.overview import document_lengths, overview, show_document, verify
from engine.data.samples import mix, permute, permute_inverse
from engine.data.shuffle import Batch, shuffled
from engine.errors import UserError
from engine.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"format": "triax-corpus", "version": 1, "tokenizer": {"hash": "abc", "vocab_size": 100}, "eod_id": 2}


def corpus(prefix: Path, documents: list[list[list[int]]], facts: dict[str, object] | None = None,
           dtype: str = "<u2") -> Path:
    """Writes documents, each of any number of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    with IndexedWriter(prefix, 100, dtype=np.dtype(dtype)) as writer:
        writer.add_documents(
            np.array([number for sequence in sequences for number in sequence], dtype),
            np.array([len(sequence) for sequence in sequences], np.int64),
            np.array([len(document) for document in documents], np.int64),
        )
        counts = {"documents": len(documents), "tokens": sum(map(len, sequences)), "text_bytes": 10}
        writer.finish(None if facts is None else {**facts, "counts": counts})
    return prefix


def documents_of(prefix: Path) -> list[list[int]]:
    opened = IndexedDataset(prefix)
    return [opened.document(n).tolist() for n in range(opened.documents)]


# --- the order of a seed


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 1 << 64))
def test_the_inverse_finds_what_was_sent_to_each_position(size: int, key: int) -> None:
    index = np.arange(size)
    assert (permute_inverse(permute(index, size, key), size, key) == index).all()
    assert (permute(permute_inverse(index, size, key), size, key) == index).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 9), st.integers(100, 20_000),
       st.integers(1, 90))
def test_shuffled_in_any_memory_is_the_order_of_the_seed(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int, memory: int, batch: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    documents = [np.full(length, n, np.uint16) for n, length in enumerate(lengths)]

    def parts() -> Iterator[np.ndarray]:
        for at in range(0, len(lengths), batch):
            yield np.array(lengths[at : at + batch], np.int64)

    def batches() -> Iterator[Batch]:
        for at in range(0, len(lengths), batch):
            yield np.concatenate(documents[at : at + batch]), np.array(lengths[at : at + batch], np.int64)

    found = list(shuffled(parts, batches, len(lengths), seed, folder / "s", np.dtype("<u2"), memory))
    order = permute(np.arange(len(lengths)), len(lengths), mix(seed))
    assert np.concatenate([tokens for tokens, _ in found]).tolist() == [n for d in order for n in documents[d].tolist()]
    assert np.concatenate([sizes for _, sizes in found]).tolist() == [lengths[d] for d in order]
    assert not list(folder.iterdir())


# --- joining


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9))
def test_joined_corpora_have_all_documents_in_order(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[list[int]]]], documents: int, tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("corpora")
    prefixes = [str(corpus(folder / f"p{n}", part, FACTS)) for n, part in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_DOCUMENTS", documents)
        patch.setattr(room, "_TOKENS", tokens)
        combine(prefixes, str(folder / "all"))
    corpus(folder / "expected", [document for part in parts for document in part])
    for suffix in (".bin", ".idx"):
        assert Path(f"{folder}/all{suffix}").read_bytes() == Path(f"{folder}/expected{suffix}").read_bytes()
    assert IndexedDataset(folder / "all").documents == sum(map(len, parts))
    facts = json.loads((folder / "all.json").read_text())
    assert facts["tokenizer"] == FACTS["tokenizer"] and len(facts["parts"]) == len(parts)
    assert "every id is below 100; every byte of both files matches" in verify(str(folder / "all"), None)


def test_corpora_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = str(corpus(tmp_path / "one", [[[1]]], FACTS))
    for name, facts, dtype, message in [
        ("wide", FACTS, "<i4", "uint16 ids and .*wide int32"),
        ("hash", {**FACTS, "tokenizer": {"hash": "other", "vocab_size": 100}}, "<u2", "differ in their tokenizer"),
        ("eod", {**FACTS, "eod_id": None}, "<u2", "differ in their end-of-document token: 2 and None"),
    ]:
        other = str(corpus(tmp_path / name, [[[1]]], facts, dtype))
        with pytest.raises(UserError, match=message):
            combine([one, other], str(tmp_path / "all"))
    with pytest.raises(UserError, match="is an input and would be overwritten"):
        combine([one], one, overwrite=True)
    with pytest.raises(UserError, match="wide.* exists"):
        combine([one], str(tmp_path / "wide"))
    (tmp_path / "hash.json").write_text("[]")
    with pytest.raises(UserError, match="hash.json does not tell how the corpus was made"):
        combine([one, str(tmp_path / "hash")], str(tmp_path / "all"))
    assert not list(tmp_path.glob("all*"))


def test_a_corpus_that_does_not_tell_its_tokenizer_makes_one_that_does_not(tmp_path: Path) -> None:
    """Megatron-LM's have no .json: what nobody knows is not claimed."""
    prefixes = [str(corpus(tmp_path / "one", [[[1]]], FACTS)), str(corpus(tmp_path / "two", [[[50]]]))]
    assert not combine(prefixes, str(tmp_path / "all")).described
    assert documents_of(tmp_path / "all") == [[1], [50]] and not (tmp_path / "all.json").exists()


def test_a_corpus_is_not_joined_with_itself_nor_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever leads to it: the same words, another spelling, links to its files or to their folder."""
    (tmp_path / "real").mkdir()
    one = corpus(tmp_path / "real" / "one", [[[1]], [[2, 3]]], FACTS)
    other = corpus(tmp_path / "other", [[[1]]], FACTS)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"soft{suffix}").symlink_to(f"{one}{suffix}")
        (tmp_path / f"hard{suffix}").hardlink_to(f"{one}{suffix}")
    (tmp_path / "folder").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    spellings = [one, "real/one", "./real/../real/one", "real//one", "folder/one", "soft", "hard"]
    for spelling in spellings:
        message = "is given twice" if spelling == one else "are one corpus"
        with pytest.raises(UserError, match=message):
            combine([str(one), str(other), str(spelling)], "all")
        with pytest.raises(UserError, match="is named twice|are one corpus; name it once"):
            parse_spec(f"{one}:1,{other}:1,{spelling}:2")
        with pytest.raises(UserError, match="is an input and would be overwritten"):
            combine([str(other), str(one)], str(spelling), overwrite=True)
    assert not list(tmp_path.glob("all*"))
    assert [prefix for prefix, _ in parse_spec(f"{one}:1,{other}:1")] == [str(one), str(other)]


@pytest.mark.parametrize("facts", [FACTS, None])
def test_copies_among_joined_corpora_are_told_and_joined(tmp_path: Path, facts: dict[str, object] | None) -> None:
    """A copy may be meant, to have a corpus count twice. Those of Megatron-LM have no checksums to look at."""
    parts = {"one": [[[1]], [[2, 3]]], "other": [[[1]], [[2, 4]]], "copy": [[[1]], [[2, 3]]], "none": [], "empty": []}
    prefixes = [str(corpus(tmp_path / name, part, facts)) for name, part in parts.items()]
    done = combine(prefixes, str(tmp_path / "all"))
    assert done.copies == ((prefixes[0], prefixes[2]),) and done.documents == 6


def test_an_output_named_by_one_of_its_files_is_written_there(tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx", "b.c/a.bin"):
        assert output_prefix(f"{tmp_path}/{name}") == f"{tmp_path}/{name[:-4]}"
    for name in ("a", "a.json", "b.bin/a", ".bin"):
        assert output_prefix(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    corpus(tmp_path / "x.bin", [])  # a prefix that itself ends so, from earlier
    assert output_prefix(f"{tmp_path}/x.bin") == f"{tmp_path}/x.bin"


def test_a_broken_index_is_not_copied(tmp_path: Path) -> None:
    one = corpus(tmp_path / "one", [[[1, 2]], [[3]], [[4, 5, 6]]])
    raw = bytearray((tmp_path / "one.idx").read_bytes())
    raw[34 + 12 + 8] += 2  # the second sequence's byte offset
    (tmp_path / "one.idx").write_bytes(raw)
    with pytest.raises(UserError, match="sequence 1 has 1 tokens at byte 6, but byte 4"):
        combine([str(one)], str(tmp_path / "all"))
    with pytest.raises(UserError, match="sequence 1"):
        verify(str(one), None)


@pytest.mark.parametrize(("change", "message"), [
    ({"tokenizer": {}}, '"tokenizer" has no number "vocab_size"'), ({"tokenizer": 5}, 'it has no "tokenizer"'),
    ({"counts": {"documents": "3", "tokens": 6}}, '"counts" has no number "documents"'),
    ({"counts": {"documents": 3, "tokens": 6, "text_bytes": []}}, '"text_bytes" is no number'),
    ({"inputs": 5}, '"inputs" is no list'), ({"inputs": [{"name": "a"}]}, '"inputs" is no list'),
])  # fmt: skip
def test_facts_that_are_none_are_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    one = corpus(tmp_path / "one", [[[1, 2]], [[3]], [[4, 5, 6]]], FACTS)
    facts = json.loads((tmp_path / "one.json").read_text())
    facts = {name: value for name, value in facts.items() if name not in ("files", "crc32")}
    (tmp_path / "one.json").write_text(json.dumps(facts | change))
    for work in (lambda: overview(str(one)), lambda: combine([str(one)], str(tmp_path / "all"))):
        with pytest.raises(UserError, match=message):
            work()


# --- looking


def test_a_document_that_begins_nowhere_is_named(tmp_path: Path) -> None:
    one = corpus(tmp_path / "one", [[[1, 2]], [[3]], [[4, 5, 6]]], FACTS)
    raw = bytearray((tmp_path / "one.idx").read_bytes())
    for number in (-100, 99):
        raw[34 + 12 * 3 + 8 : 34 + 12 * 3 + 16] = number.to_bytes(8, "little", signed=True)
        (tmp_path / "one.idx").write_bytes(raw)
        with pytest.raises(UserError, match="begins at no sequence"):
            overview(str(one))


def test_lengths_are_those_of_documents_of_any_number_of_sequences(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "c", [[], [[1, 2], [3]], [[4]], [[]], [[5] * 9], []], FACTS)
    lengths = np.concatenate(list(document_lengths(IndexedDataset(prefix)))).tolist()
    assert lengths == [0, 3, 1, 0, 9, 0]
    lines = overview(str(prefix))
    assert "6 documents, 5 sequences, 13 tokens" in lines[0]
    bars = {line.split()[1]: int(line.split()[2]) for line in lines if line.strip().startswith("to ")}
    assert bars == {"0": 3, "1": 1, "2": 0, "4": 1, "8": 0, "16": 1}


def test_an_empty_corpus_can_be_looked_at(tmp_path: Path) -> None:
    assert "0 documents" in overview(str(corpus(tmp_path / "c", [])))[0]
    assert "0 pointers and 0 ids" in verify(str(tmp_path / "c"), None)


def test_a_document_is_shown_as_tokens_and_safe_text(tmp_path: Path, vocabulary: str) -> None:
    tokenizer = load_tokenizer(vocabulary)
    ids = [*tokenizer.encode("the cat\x1b[31m sat\n"), 2]
    with IndexedWriter(tmp_path / "c", tokenizer.vocab_size) as writer:
        writer.add_document(np.array(ids))
        writer.finish()
    lines = show_document(str(tmp_path / "c"), 0, tokenizer)
    assert lines == [f"document 0: {len(ids)} tokens", " ".join(map(str, ids)), "the cat\ufffd[31m sat\n"]
    with pytest.raises(UserError, match="no document 1: .* has 1, from 0 to 0"):
        show_document(str(tmp_path / "c"), 1, None)


def test_verify_finds_ids_outside_and_facts_of_another_corpus(tmp_path: Path) -> None:
    """Of a time without checksums, which would find both."""
    for name, documents in (("c", [[[1, 99]]]), ("d", [[[1]]])):
        corpus(tmp_path / name, documents, FACTS)
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        del facts["files"], facts["crc32"]
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    with open(tmp_path / "c.bin", "r+b") as file:
        file.write(b"\x64")
    with pytest.raises(UserError, match="token id 100 is outside the vocabulary of 100"):
        verify(str(tmp_path / "c"), None)
    (tmp_path / "c.json").write_bytes((tmp_path / "d.json").read_bytes())
    (tmp_path / "c.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(UserError, match="they do not belong together"):
        verify(str(tmp_path / "c"), None)


def test_another_tokenizer_than_the_corpus_was_made_with_is_refused(tmp_path: Path, vocabulary: str) -> None:
    corpus(tmp_path / "c", [[[1]]], FACTS)
    for look in (lambda: show_document(str(tmp_path / "c"), 0, load_tokenizer(vocabulary)),
                 lambda: verify(str(tmp_path / "c"), load_tokenizer(vocabulary))):
        with pytest.raises(UserError, match="made with another tokenizer"):
            look()


def test_the_tools_print_and_exit(tmp_path: Path, vocabulary: str) -> None:
    def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    corpus(tmp_path / "one", [[[1]], [[2, 3]]], FACTS)
    corpus(tmp_path / "more", [[[1]], [[2, 3]]], FACTS)
    done = tool("merge_datasets.py", "--input", "one.bin", "more.idx", "--output-prefix", "two.bin")
    assert done.stdout == ("two: 4 documents, 6 tokens of 2 corpora\none and more hold the same tokens, by their "
                           "checksums: their documents are there twice\n") and done.returncode == 0
    done = tool("inspect_data.py", "two", "--verify")
    assert done.returncode == 0 and "two: 4 documents" in done.stdout and "verified: 4 pointers" in done.stdout
    assert tool("inspect_data.py", "two", "--doc", "3").stdout == "document 3: 2 tokens\n2 3\n"
    failed = tool("inspect_data.py", "none")
    assert failed.returncode == 2 and failed.stderr.startswith("error: none.idx does not exist")
