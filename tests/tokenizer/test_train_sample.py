"""The sample a vocabulary is trained on: every text has the same chance, and only seed and texts decide."""

from __future__ import annotations

import bz2
import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.tokenizer.sample import Reservoir, Sample, SampleSettings, draw_sample

TEXTS = [f"text {n} " + "äöü 中文 x" * (n % 9) for n in range(400)]


def drawn(texts: list[str], budget: int, seed: int = 1) -> list[bytes]:
    """The sample of a list of texts."""
    reservoir = Reservoir(budget, seed)
    for text in texts:
        reservoir.add(text)
    return reservoir.documents()


def jsonl(path: Path, texts: list[str]) -> str:
    """A file of JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


# --- the reservoir


@given(
    texts=st.lists(st.one_of(st.sampled_from(["a", "bb", "数学"]), st.text(st.characters(codec="utf-8"), min_size=1))),
    budget=st.integers(1, 60),
    shuffler=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_the_order_of_the_texts_does_not_matter(texts: list[str], budget: int, shuffler: object) -> None:
    shuffled = list(texts)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    sample = drawn(texts, budget)
    assert sample == drawn(shuffled, budget)
    size, total = sum(map(len, sample)), sum(len(text.encode()) for text in texts)
    assert size <= budget
    if total <= budget:
        assert sorted(sample) == sorted(text.encode() for text in texts)
    else:
        assert size > budget - 4  # a character that does not fit is left out whole
    for part in sample:
        part.decode()


def test_a_sample_is_the_beginning_of_a_larger_one() -> None:
    small, large = drawn(TEXTS, 1000), drawn(TEXTS, 5000)
    assert large[: len(small) - 1] == small[:-1] and large[len(small) - 1].startswith(small[-1])


def test_the_chance_does_not_depend_on_place_or_length() -> None:
    """100 seeds, half of 200 short texts and 200 long ones: each text is in about half of the samples."""
    long = [f"long {n}" + "x" * 100 for n in range(200)]
    texts = [f"s{n}" for n in range(100)] + long + [f"t{n}" for n in range(100)]
    budget = sum(map(len, texts)) // 2
    counts = dict.fromkeys(texts, 0)
    for seed in range(100):
        for data in drawn(texts, budget, seed)[:-1]:  # the last may be cut
            counts[data.decode()] += 1
    for is_long in (False, True):
        assert 0.47 < sum(counts[text] for text in texts if (len(text) > 9) is is_long) / 20000 < 0.53
    first, last = (sum(counts[text] for text in part) / 10000 for part in (texts[:100], texts[-100:]))
    assert abs(first - last) < 0.04
    assert all(25 <= count <= 75 for count in counts.values())


def test_copies_of_a_text_are_all_kept_or_thinned() -> None:
    texts = [*TEXTS, *["the same again"] * 1000]
    total = sum(len(text.encode()) for text in texts)
    assert drawn(texts, total).count(b"the same again") == 1000
    shares = [drawn(texts, total // 20, seed).count(b"the same again") for seed in range(60)]
    assert max(shares) < 400 and any(share == 0 for share in shares)


def test_a_text_larger_than_the_budget_is_cut_between_characters() -> None:
    assert drawn(["数" * 100], 10) == ["数数数".encode()]
    assert drawn(["数" * 100], 2) == []


def test_memory_is_bounded_by_the_budget() -> None:
    tracemalloc.start()
    reservoir = Reservoir(1 << 20, 0)
    for n in range(20000):
        reservoir.add(f"{n} " + "x" * 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20 and sum(map(len, reservoir.documents())) == 1 << 20


# --- reading


def test_all_kinds_of_input_give_one_sample_whatever_their_order_and_packing(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "a" / "one.jsonl", TEXTS[:200])
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in TEXTS[200:300]]))
    packed = tmp_path / "c.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(text for text in TEXTS[300:]).encode("utf-16")))
    whole = jsonl(tmp_path / "whole" / "all.jsonl", TEXTS)

    def draw(*inputs: object, seed: int = 1) -> Sample:
        paths = [str(path) for path in inputs]
        return draw_sample(SampleSettings(inputs=paths, split_text="line", sample_bytes=3000, seed=seed))

    sample = draw(tmp_path / "a", tmp_path / "b.json", packed)
    assert sample.documents == draw(packed, tmp_path / "*.json", one).documents == draw(whole).documents
    assert sample.documents != draw(whole, seed=5).documents
    assert sample.read.documents == 400 and 2997 <= sample.size <= 3000
    assert sample.read.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_articles_of_a_dump_are_sampled(shared_data: Path) -> None:
    dump = str(shared_data / "wiki" / "enwiki-206pages.xml.bz2")
    sample = draw_sample(SampleSettings(inputs=[dump]))
    assert sample.read.documents == len(sample.documents) == 106 and sum(sample.read.left_out.values()) == 100
    assert not any("[[" in text[:2000] for text in sample.texts())
    part = draw_sample(SampleSettings(inputs=[dump], sample_bytes=100_000))
    assert 99_997 <= part.size <= 100_000 and part.read.documents == 106


def test_a_bad_record_stops_or_is_skipped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "tw\xff"}\n\n{"text": " "}\n{"body": "x"}\n{"text": "three"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: byte .* is not UTF-8.*--on-error skip"):
        draw_sample(SampleSettings(inputs=[str(path)]))
    read = draw_sample(SampleSettings(inputs=[str(path)], on_error="skip")).read
    assert (read.documents, read.skipped, read.empty) == (2, 2, 1)
    assert [fault.split(": ")[0][-10:] for fault in read.faults] == ["/a.jsonl:2", "/a.jsonl:5"]


def test_cut_archives_and_missing_files_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "a.jsonl.bz2"
    cut.write_bytes(bz2.compress(b'{"text": "x"}\n' * 9999)[:-9])
    with pytest.raises(UserError, match="a.jsonl.bz2:"):
        draw_sample(SampleSettings(inputs=[str(cut)]))
    with pytest.raises(UserError, match="none.jsonl"):
        draw_sample(SampleSettings(inputs=[str(tmp_path / "none.jsonl")]))


def test_a_part_of_the_input_is_read_where_that_is_asked_for(tmp_path: Path) -> None:
    for number in range(8):
        jsonl(tmp_path / "in" / f"{number}.jsonl", [f"{number} {n} " + "x" * 1000 for n in range(3000)])
    files = [str(path) for path in (tmp_path / "in").iterdir()]
    some = draw_sample(SampleSettings(inputs=files, read_bytes=6_000_000))
    assert some.read.input_bytes < 7_000_000 and some.read.documents == 6000
    assert some.documents == draw_sample(SampleSettings(inputs=files[::-1], read_bytes=6_000_000)).documents
    read = [draw_sample(SampleSettings(inputs=files, read_bytes=1, seed=seed)).texts() for seed in range(12)]
    assert len({next(texts)[0] for texts in read}) > 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sample_bytes": 0}, "--sample-megabytes"), ({"read_bytes": -1}, "--read-"), ({"seed": 1 << 70}, "64 bits")],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw_sample(SampleSettings(inputs=[jsonl(tmp_path / "a.jsonl", TEXTS)], **change))
