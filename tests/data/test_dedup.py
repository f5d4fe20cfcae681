"""Deduplication: the lowest document stays, whatever the batches, the memory and the order of discovery."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data import units as units_room
from engine.data.dedup import Deduplicator, Dropped, Exact, Method, MinHash, parse_method
from engine.data.dedup import external as room
from engine.data.dedup.groups import Groups
from engine.data.units import SPACELESS, characters, run_lengths, run_sums, units, weigh
from engine.errors import UserError

TINY = 1  # bytes of memory: the block then is at its least
WORDS = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "en", "ir", "oto", "undu", "ikas", "ela", "yr")]
LOOSE = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def edited(rng: random.Random, text: str, share: float) -> str:
    """The text with a share of its words replaced."""
    return " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split())


def similarity(one: str, other: str, width: int = 5) -> float:
    """Jaccard similarity of word shingles, by sets."""
    sets = []
    for text in (one, other):
        words = text.split()
        sets.append({tuple(words[at : at + width]) for at in range(len(words) - width + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def shingles(text: str) -> set[int]:
    found = units(text.lower())
    return set(run_sums(found.hashes, run_lengths(weigh(found.spaceless), 5)).tolist())


def drop(folder: Path, method: Method, signatures: np.ndarray, **other: int) -> Dropped:
    with Deduplicator(folder, method, **other) as deduplicator:
        deduplicator.add(0, signatures)
        return deduplicator.finish()


def ids_dropped(dropped: Dropped) -> list[int]:
    return np.flatnonzero(dropped.is_dropped(np.arange(dropped.documents))).tolist()


def naive(signatures: np.ndarray, words: int) -> list[int]:
    """Each document's keeper, by a dictionary a band and union by hand."""
    keeper = list(range(len(signatures)))

    def root(document: int) -> int:
        while keeper[document] != document:
            document = keeper[document]
        return document

    for band in range(0, signatures.shape[1], words):
        seen: dict[tuple[int, ...], int] = {}
        for document, row in enumerate(signatures[:, band : band + words].tolist()):
            low, high = sorted((root(seen.setdefault(tuple(row), document)), root(document)))
            keeper[high] = low
    return [root(document) for document in range(len(signatures))]


class Keys:
    """A method whose keys a test writes itself."""

    def __init__(self, bands: int, words: int) -> None:
        self.bands, self.words = bands, words


@given(st.lists(st.text("ab \n", max_size=6), max_size=40))
@LOOSE
def test_exact_drops_each_text_that_came_before_and_no_other(tmp_path: Path, texts: list[str]) -> None:
    method = Exact()
    dropped = drop(tmp_path, method, method.signatures(texts))
    assert ids_dropped(dropped) == [n for n, text in enumerate(texts) if text in texts[:n]]
    assert [dropped.keeper(n) for n in range(len(texts))] == [texts.index(text) for text in texts]
    assert dropped.dropped == len(texts) - len(set(texts))
    assert dropped.groups == sum(texts.count(text) > 1 for text in set(texts))


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=60),
    shape=st.sampled_from([(1, 1), (4, 1), (1, 2), (2, 2)]),
    block=st.integers(1, 9),
    spread=st.booleans(),
)
@LOOSE
def test_sorting_on_disk_finds_the_groups_that_dictionaries_find(
    tmp_path: Path, rows: list[list[int]], shape: tuple[int, int], block: int, spread: bool
) -> None:
    """Small numbers all fall into the first partition, multiplied ones into all."""
    bands, words = shape
    signatures = np.array(rows, np.uint64).reshape(len(rows), 4)[:, : bands * words]
    if spread:
        signatures *= np.uint64(0x9E3779B97F4A7C15)
    method = Keys(bands, words)
    with Deduplicator(tmp_path, method) as deduplicator:
        deduplicator.block = block
        deduplicator.add(0, signatures)
        dropped = deduplicator.finish()
    keepers = naive(signatures, words)
    assert [dropped.keeper(n) for n in range(len(rows))] == keepers
    assert ids_dropped(dropped) == [n for n, keeper in enumerate(keepers) if keeper != n]
    assert list(dropped.pairs()) == [(n, keeper) for n, keeper in enumerate(keepers) if keeper != n]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["groups.json", "groups.u64"]


def test_memory_of_a_block_is_what_was_granted(tmp_path: Path) -> None:
    """A fifth of the documents share one key; the array of a memory map is not counted by tracemalloc."""
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**64, (300_000, 2), dtype=np.uint64)
    signatures[rng.integers(0, 2, 300_000) == 0, 1] = 7
    memory, method = 4 << 20, Keys(2, 1)
    with Deduplicator(tmp_path, method, memory) as deduplicator:
        deduplicator.add(0, signatures)
        tracemalloc.start()
        dropped = deduplicator.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert deduplicator.block < 30_000
    assert peak < 1.1 * memory
    same = np.flatnonzero(signatures[:, 1] == 7)
    assert ids_dropped(dropped) == same[1:].tolist()
    assert dropped.keeper(int(same[-1])) == same[0]


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.integers(1, 20))
@LOOSE
def test_groups_do_not_depend_on_the_order_in_which_pairs_are_found(
    tmp_path: Path, pairs: list[tuple[int, int]], step: int
) -> None:
    groups = Groups(tmp_path, 30)
    for at in range(0, len(pairs), step):
        one, other = np.array(pairs[at : at + step]).T
        groups.join(one, other)
    dropped = groups.finish()
    near = {n: {n} for n in range(30)}
    for one, other in pairs:
        merged = near[one] | near[other]
        for member in merged:
            near[member] = merged
    assert [dropped.keeper(n) for n in range(30)] == [min(near[n]) for n in range(30)]


@pytest.mark.parametrize("order", ["up", "down", "star", "shuffled"])
def test_a_chain_of_a_hundred_thousand_is_one_group_in_little_time(tmp_path: Path, order: str) -> None:
    """A loop that climbs a chain one step at a time would take hours."""
    count = 100_000
    ids = np.arange(count - 1)
    if order == "down":
        ids = ids[::-1]
    if order == "shuffled":
        ids = np.random.default_rng(0).permutation(ids)
    groups = Groups(tmp_path, count)
    if order == "star":
        groups.join(np.full(count - 1, count - 1), ids)
    else:
        groups.join(ids, ids + 1)
    dropped = groups.finish()
    assert (dropped.dropped, dropped.groups) == (count - 1, 1)
    assert dropped.keeper(count - 1) == dropped.keeper(count // 2) == 0


@pytest.mark.parametrize("method", [Exact(), MinHash(), MinHash(3, 2)])
def test_no_documents_at_all(tmp_path: Path, method: Exact | MinHash) -> None:
    empty = method.signatures([])
    assert empty.shape == (0, method.bands * method.words)
    dropped = drop(tmp_path, method, empty)
    assert (dropped.documents, dropped.dropped, dropped.groups) == (0, 0, 0)
    assert dropped.is_dropped(np.array([], int)).tolist() == []
    assert list(dropped.pairs()) == []


TEXTS = st.one_of(
    st.text(max_size=30),
    st.text("ab ", max_size=40),
    st.text("我爱你。abกิข ", max_size=30),
    st.text("İß\n\ud800", max_size=9),
    st.sampled_from(["", " ", "\n\n", "one", "!!!"]),
)


@given(st.lists(TEXTS, max_size=30), st.randoms(), st.integers(1, 64))
@LOOSE
def test_a_signature_depends_on_its_text_alone(texts: list[str], rng: random.Random, batch: int) -> None:
    """Any split of documents into workers and batches gives the same signatures; here batches of a few characters."""
    method = MinHash(4, 2)
    whole = method.signatures(texts)
    cuts = sorted(rng.randrange(len(texts) + 1) for _ in range(3))
    parts = [texts[one:other] for one, other in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
    assert np.array_equal(np.concatenate([method.signatures(part) for part in parts]), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.data.dedup.minhash._BATCH", batch)
        assert np.array_equal(method.signatures(texts), whole)
    assert b"".join(map(method.signature, texts)) == whole.astype("<u8").tobytes()


@given(st.lists(st.tuples(st.text("ab我 \n", max_size=40)), max_size=20), st.integers(4, 60))
@LOOSE
def test_long_texts_are_cut_where_their_neighbours_do_not_matter(texts: list[tuple[str]], piece: int) -> None:
    """Texts longer than a piece, in pieces of a few characters."""
    method = MinHash(4, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_room, "_PIECE", piece)
        patch.setattr("engine.data.dedup.minhash._BATCH", piece)
        together = method.signatures([text for (text,) in texts])
        apart = [method.signatures([text])[0] for (text,) in texts]
    assert [row.tolist() for row in together] == [row.tolist() for row in apart]


def test_pieces_of_a_long_text_have_the_units_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(random.Random(1), 300) + " 我爱你 。กิน " + prose(random.Random(2), 300)
    whole = units(text)
    monkeypatch.setattr(units_room, "_PIECE", 64)
    for mine, theirs in zip(units(text), whole, strict=True):
        assert np.array_equal(mine, theirs)


def test_units_are_words_or_characters_without_spaces() -> None:
    text = "Hello, wörld's 42nd; 我爱 Python3编程。กิน, cafe\u0301s и ещё"
    found = units(text)
    assert [text[a:b] for a, b in zip(found.starts, found.ends, strict=True)] == [
        "Hello", "wörld", "s", "42nd", "我", "爱", "Python3", "编", "程", "กิ", "น", "cafe\u0301s", "и", "ещё",
    ]
    assert "".join("x" if spaceless else "." for spaceless in found.spaceless) == "....xx.xxxx..."
    assert characters("a漢")[1][1] == SPACELESS


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", "漢", "字"]), max_size=20), st.integers(1, 6))
@LOOSE
def test_runs_weigh_as_asked_and_hash_alike_when_equal(words: list[str], length: int) -> None:
    """Eight Chinese letters weigh what five words weigh."""
    found = units(" ".join(words))
    lengths = run_lengths(weigh(found.spaceless), length)
    hashes = run_sums(found.hashes, lengths).tolist()
    ends = [start + lengths if isinstance(lengths, int) else start + lengths[start] for start in range(len(hashes))]
    weights = [5 if word in "漢字" else 8 for word in words]
    for start, end in enumerate(ends):
        assert sum(weights[start : end - 1]) < 8 * length <= sum(weights[start:end])
    assert len(ends) == len(words) or sum(weights[len(ends) :]) < 8 * length
    spans = [tuple(words[start:end]) for start, end in enumerate(ends)]
    assert len(set(hashes)) == len(set(spans)) == len(set(zip(spans, hashes, strict=True)))


def test_five_words_are_eight_chinese_letters() -> None:
    chinese, english = units("天地玄黄宇宙洪荒日月"), units("a b c d e f g")
    assert np.array_equal(run_lengths(weigh(chinese.spaceless), 5), [8, 8, 8])
    assert run_lengths(weigh(english.spaceless), 5) == 5


def test_case_and_punctuation_make_no_difference_but_words_do() -> None:
    method = MinHash()
    base = "The quick brown fox jumps over the lazy dog, twice a day."
    same = [base, base.upper(), base.replace(",", " --").replace(" ", "\n"), base + " (!)"]
    assert len({method.signature(text) for text in same}) == 1
    assert method.signature(base) != method.signature(base.replace("fox", "cat"))


@pytest.mark.parametrize(
    ("texts", "stay"),
    [
        (["", " ", "\n\t\n", "", "\ufeff"], [0, 4]),
        (["!!!", "???", " !!! "], [0, 1]),
        (["one", "One.", "two", "one one", "one"], [0, 2, 3]),
        (["a b c d", "a b c d e", "a, b, c; d", "a b c"], [0, 1, 3]),
        (["猫", "犬", "「猫」", "猫猫"], [0, 1, 3]),
        (["1 2 3 4 5 6", "6 5 4 3 2 1", "1 2 3 4 5 6"], [0, 1]),
    ],
)
def test_texts_shorter_than_a_shingle_are_compared_whole(tmp_path: Path, texts: list[str], stay: list[int]) -> None:
    method = MinHash()
    dropped = drop(tmp_path, method, method.signatures(texts))
    assert sorted(set(range(len(texts))) - set(ids_dropped(dropped))) == stay


def collisions(method: MinHash, make: Callable[[], tuple[str, str]], pairs: int) -> tuple[float, float]:
    """The share of pairs that agree in a band, and the share that theory gives for their similarities."""
    texts = [make() for _ in range(pairs)]
    one = method.signatures([text for text, _ in texts])
    other = method.signatures([text for _, text in texts])
    theory = [method.chance(similarity(*pair)) for pair in texts]
    return float((one == other).any(axis=1).mean()), float(np.mean(theory))


@pytest.mark.parametrize("words", [30, 400])
@pytest.mark.parametrize("share", [0.01, 0.03, 0.06, 0.12])
def test_the_collision_curve_is_that_of_theory(words: int, share: float) -> None:
    """600 pairs a point: four standard errors of the measured share, plus what is left of chance in 0 and 1."""
    rng = random.Random(f"{words} {share}")

    def make() -> tuple[str, str]:
        text = prose(rng, words)
        return text, edited(rng, text, share)

    found, theory = collisions(MinHash(), make, 600)
    assert abs(found - theory) < 4 * (theory * (1 - theory) / 600) ** 0.5 + 0.005


def test_minima_agree_as_often_as_sets_do() -> None:
    """One band of one row: the share of agreeing functions estimates the similarity without bias."""
    method = MinHash(512, 1)
    rng = random.Random(5)
    text = prose(rng, 500)
    other = edited(rng, text, 0.05)
    agree = float((method.signatures([text]) == method.signatures([other])).mean())
    true = similarity(text, other)
    assert abs(agree - true) < 4 * (true * (1 - true) / 512) ** 0.5


def test_chinese_near_duplicates_are_found_and_others_stay(tmp_path: Path) -> None:
    rng = random.Random(3)
    signs = [chr(0x4E00 + rng.randrange(3000)) for _ in range(800)]
    texts = ["".join(rng.choice(signs) for _ in range(600)) for _ in range(40)]
    copies = ["。".join(text[at : at + 50] for at in range(0, 600, 50)) + "完" for text in texts]
    method = MinHash()
    dropped = drop(tmp_path, method, method.signatures(texts + copies))
    assert ids_dropped(dropped) == list(range(40, 80))
    assert [dropped.keeper(n) for n in range(40, 80)] == list(range(40))


def test_duplicates_are_transitive(tmp_path: Path) -> None:
    """Each text shares a key with the next alone; the chain is one group."""
    chain = np.array([[1, 10], [2, 10], [2, 20], [3, 20], [9, 99]], np.uint64)
    dropped = drop(tmp_path, Keys(2, 1), chain)
    assert ids_dropped(dropped) == [1, 2, 3]
    assert dropped.groups == 1


def test_a_killed_run_is_started_again_over_its_remains(tmp_path: Path) -> None:
    method = MinHash()
    texts = [prose(random.Random(n // 2), 50) for n in range(20)]
    script = (
        "import os, sys, numpy as np\n"
        "from engine.data.dedup import Deduplicator, MinHash\n"
        "with Deduplicator(sys.argv[1], MinHash()) as deduplicator:\n"
        "    deduplicator.add(0, np.ones((5000, 14), np.uint64))\n"
        "    deduplicator.block = 100\n"
        "    if sys.argv[2] == 'late':\n"
        "        from pathlib import Path\n"
        "        Path.unlink = lambda *_, **__: os._exit(9)\n"
        "        deduplicator.finish()\n"
        "    os._exit(9)\n"
    )
    for when in ("early", "late"):
        drop(tmp_path, method, method.signatures(texts[:2]))
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), when], cwd=root)
        assert done.returncode == 9
        assert Dropped.load(tmp_path) is None  # nor is the finished run from before taken for this one
        assert len(list(tmp_path.iterdir())) > 2
        again = drop(tmp_path, method, method.signatures(texts))
        assert ids_dropped(again) == list(range(1, 20, 2))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["groups.json", "groups.u64"]


def test_a_result_travels_to_other_processes_and_later_runs(tmp_path: Path) -> None:
    method = Exact()
    dropped = drop(tmp_path, method, method.signatures(["a", "b", "a"]))
    dropped.is_dropped(np.array([0]))
    sent = pickle.dumps(dropped)
    assert len(sent) < 1000
    for copy in (pickle.loads(sent), Dropped.load(tmp_path)):
        assert copy == dropped
        assert copy.is_dropped(np.array([[2, 1]])).tolist() == [[True, False]]
    assert Dropped.load(tmp_path / "elsewhere") is None


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(room.Deduplicator, "_paths", lambda self: [Path("/dev/full")])
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(UserError, match="No space left on device"):
        drop(tmp_path, Exact(), Exact().signatures(["a"] * 9000))


def test_ids_and_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with Deduplicator(tmp_path, MinHash()) as deduplicator:
        deduplicator.add(0, np.zeros((3, 14), np.uint64))
        with pytest.raises(ValueError, match="document 4 follows 2"):
            deduplicator.add(4, np.zeros((1, 14), np.uint64))
        with pytest.raises(ValueError, match=r"\(1, 13\)"):
            deduplicator.add(3, np.zeros((1, 13), np.uint64))


def test_the_method_is_named_as_users_name_it() -> None:
    assert parse_method("none") is None
    assert isinstance(parse_method("exact"), Exact)
    near = parse_method("near")
    assert isinstance(near, MinHash) and (near.bands, near.rows) == (14, 8)
    other = parse_method("near:20x5")
    assert isinstance(other, MinHash) and (other.bands, other.rows) == (20, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no way to deduplicate"),
        ("exakt", "did you mean exact"),
        ("exact:1x1", "known are none, exact, near"),
        ("near:8", "near:20x5"),
        ("near:0x8", "1 to 512 bands"),
        ("near:513x1", "1 to 512 bands"),
        ("near:9999x9999", "4,096"),
        ("near:٣x٣", "no way to deduplicate"),
    ],
)
def test_a_method_that_is_none_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_method(spec)


def test_real_chats_from_templates_are_found_as_often_as_theory_says(shared_data: Path, tmp_path: Path) -> None:
    """Rows that share most of their words with many others: such pairs collide together or not at all, so what theory
    says holds on average over sets of hash functions, here 24."""
    rows = json.loads((shared_data / "sft/vicuna_dummy_sharegpt.json").read_text())
    texts = ["\n".join(turn["value"] for turn in row["conversations"]) for row in rows][:120]
    sets = [shingles(text) for text in texts]
    one, other = np.triu_indices(len(texts), 1)
    similar = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in zip(one, other, strict=True)]
    theory = np.mean([MinHash().chance(value) for value in similar])
    assert theory > 0.01
    found = []
    for seed in range(24):
        signatures = MinHash(seed=seed).signatures(texts)
        found.append((signatures[one] == signatures[other]).any(axis=1).mean())
    assert abs(np.mean(found) - theory) < 4 * np.std(found) / 24**0.5


def test_real_articles_find_their_edited_copies_and_nothing_else(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "text/c4_demo.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rng = random.Random(0)
    copies = [edited(rng, text, 0.01) for text in texts]
    method = MinHash()
    assert ids_dropped(drop(tmp_path, method, method.signatures(texts))) == []
    dropped = drop(tmp_path, method, method.signatures(texts + copies))
    gone = ids_dropped(dropped)
    assert len(gone) >= 0.97 * len(texts)
    assert all(dropped.keeper(document) == document - len(texts) for document in gone)
