"""Merging many pieces at once gives each the ids of the merge loop, for any vocabulary."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer import merge
from engine.tokenizer.bpe import ByteVocabulary
from engine.tokenizer.merge import LONGEST, BatchMerge

DTYPE = np.dtype("<i4")
BYTES = {bytes([byte]): byte for byte in range(256)}
Pair = tuple[bytes, bytes]


@pytest.fixture(autouse=True)
def few_are_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(merge, "_FEW", 0)
    yield


def vocabularies(pairs: list[Pair]) -> Iterator[ByteVocabulary]:
    """GPT-2's kind, the same that looks whole pieces up, and tiktoken's."""
    ids = dict(BYTES)
    for one, two in pairs:
        for piece in (one, two, one + two):
            ids.setdefault(piece, len(ids))
    ranks = {pair: number for number, pair in enumerate(pairs)}
    yield ByteVocabulary(ids, ranks)
    yield ByteVocabulary(ids, ranks, whole_first=True)
    yield ByteVocabulary(ids)


def check(vocabulary: ByteVocabulary, pieces: list[bytes]) -> None:
    ends = np.cumsum(list(map(len, pieces)), dtype=np.int64)
    starts = ends - list(map(len, pieces))
    batch = BatchMerge(vocabulary, DTYPE)
    for _ in "cold", "warm":
        ids, id_ends = batch(b"".join(pieces), starts, ends)
        assert ids.dtype == DTYPE
        assert [part.tolist() for part in np.split(ids, id_ends)[:-1]] == [vocabulary.encode(one) for one in pieces]


@settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(*[st.binary(min_size=1, max_size=4)] * 2), unique=True, max_size=60), data=st.data())
def test_any_merges_and_pieces_also_of_few_letters(pairs: list[Pair], data: st.DataObject) -> None:
    """Also merges that contradict each other, go in circles, or cannot be reached."""
    if data.draw(st.booleans()):  # letters that meet often
        pairs = list(dict.fromkeys((_few(one), _few(two)) for one, two in pairs))
    parts = [part for one, two in pairs for part in (one, two, one + two)] or [b"a"]
    piece = st.lists(st.sampled_from(parts) | st.binary(min_size=1, max_size=1), min_size=1, max_size=12).map(b"".join)
    pieces = data.draw(st.lists(piece, max_size=12))
    for vocabulary in vocabularies(pairs):
        check(vocabulary, [*pieces, *pieces[:2]])


def _few(text: bytes) -> bytes:
    return bytes(0x61 + byte % 3 for byte in text)


def trained(rng: random.Random, letters: bytes, merges: int) -> list[Pair]:
    """Merges in an order that training could give: each joins what others made before."""
    parts = [bytes([letter]) for letter in letters]
    pairs: dict[Pair, None] = {}
    while len(pairs) < merges:
        pair = rng.choice(parts), rng.choice(parts)
        if len(b"".join(pair)) <= 12 and pair not in pairs:
            pairs[pair] = None
            parts.append(b"".join(pair))
    return list(pairs)


@pytest.mark.parametrize("seed", range(8))
def test_trained_merges_on_pieces_of_every_length(seed: int) -> None:
    """Several ways lead to a piece here, so that tiktoken's ranks tie."""
    rng = random.Random(seed)
    pairs = trained(rng, b"abcd"[: 1 + seed % 4], 10 + 30 * (seed % 3))
    lengths = [*range(1, LONGEST + 8)] * 5
    pieces = [bytes(rng.choices(b"abcd" if seed % 2 else b"aab", k=length)) for length in lengths]
    for vocabulary in vocabularies(pairs):
        check(vocabulary, pieces)


def test_runs_are_joined_from_the_left() -> None:
    pairs = [(b"a", b"a"), (b"aa", b"aa"), (b"aa", b"a"), (b"a", b"b"), (b"ab", b"ab"), (b"ab", b"a")]
    runs = [letters * count for letters in (b"a", b"ab", b"aab", b"ba") for count in range(1, 70)]
    for vocabulary in vocabularies(pairs):
        check(vocabulary, runs)
    check(ByteVocabulary(BYTES | {b"aa": 256}), runs)


def test_a_pair_that_a_join_makes_may_come_before_the_next_of_its_kind() -> None:
    """(ab, a) has a lower rank than (a, b): no training gives that, a file may."""
    for vocabulary in vocabularies([(b"ab", b"a"), (b"a", b"b"), (b"aba", b"b")]):
        check(vocabulary, [b"ab" * count for count in range(1, 16)])
    first = next(vocabularies([(b"ab", b"a"), (b"a", b"b")]))
    assert first.merge(b"abab") == [b"aba", b"b"]


def test_pieces_of_every_length_up_to_and_over_the_longest_remembered() -> None:
    rng = random.Random(0)
    pairs = trained(rng, b"-+", 40)
    pieces = [bytes(rng.choices(b"-+", weights=[9, 1], k=length)) for length in (LONGEST, LONGEST + 1, 700, 1025, 4000)]
    for vocabulary in vocabularies(pairs):
        check(vocabulary, [b"-", *pieces, b"+", *pieces])


def test_a_few_pieces_are_merged_like_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_FEW", 3)
    for vocabulary in vocabularies(trained(random.Random(1), b"ab", 20)):
        for number in range(6):
            check(vocabulary, [b"abba" * (place + 1) for place in range(number)])


def test_what_merging_does_not_make_is_known() -> None:
    """An entry that no merge leads to, one that another merge comes in the way of, and one above the longest piece."""
    ids = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259, b"q" * 50: 260}
    assert set(BatchMerge(ByteVocabulary(ids), DTYPE).not_made()) == {b"xyz", b"q" * 50}
    ranks = {(b"a", b"b"): 0, (b"b", b"c"): 1, (b"a", b"bc"): 2}
    found = BatchMerge(ByteVocabulary(ids, ranks, whole_first=True), DTYPE).not_made()
    assert set(found) == {b"abc", b"xyz", b"q" * 50}


def test_a_byte_that_the_vocabulary_lacks_is_an_error() -> None:
    batch = BatchMerge(ByteVocabulary({b"a": 0}), DTYPE)
    assert batch(b"aa", np.array([0, 1]), np.array([1, 2]))[0].tolist() == [0, 0]
    for piece in (b"ab", b"b" * (LONGEST + 1)):
        with pytest.raises(KeyError, match="lacks a byte"):
            batch(piece, np.array([0]), np.array([len(piece)]))
