"""Data order is a function: bijective, covering, independent of chunking, moving from epoch to epoch."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import open_samples
from engine.data.blend import Blend, parse_spec
from engine.data.indexed import IndexedWriter
from engine.data.samples import permute
from engine.errors import UserError


def corpus(folder: Path, lengths: list[int], name: str = "c", first: int = 0) -> str:
    """A corpus whose token i is `first + i`, in documents of these lengths."""
    with IndexedWriter(folder / name, 60000) as writer:
        writer.add_documents(np.arange(first, first + sum(lengths)), np.array(lengths))
        writer.finish()
    return str(folder / name)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_of_a_huge_range_is_computed_alone_and_inside() -> None:
    size = 10**13 + 7
    index = np.array([0, 1, size - 1, 12345678901])
    one = np.concatenate([permute(index[n : n + 1], size, 5) for n in range(4)])
    assert np.array_equal(one, permute(index, size, 5))
    assert len(set(one.tolist())) == 4 and one.min() >= 0 and one.max() < size


def test_permutation_looks_shuffled() -> None:
    order = permute(np.arange(10000), 10000, 1)
    assert abs(np.corrcoef(order, np.arange(10000))[0, 1]) < 0.05
    assert np.mean(np.diff(order) == 1) < 0.01
    assert np.mean(order == permute(np.arange(10000), 10000, 2)) < 0.01


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(9, 400), seq_len=st.integers(1, 8), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_every_label_position_is_met_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, seq_len: int, seed: int, epoch: int
) -> None:
    prefix = corpus(tmp_path_factory.mktemp("c"), [tokens])
    samples = open_samples(prefix, seq_len=seq_len, seed=seed)
    n = samples.epoch_size
    assert n == tokens // seq_len
    rows = samples.rows(epoch * n, n)
    labels = rows[:, 1:].ravel()
    assert len(set(labels.tolist())) == n * seq_len  # once each; only tokens % seq_len are left to another epoch
    assert np.all(np.diff(rows, axis=1) % tokens == 1)  # each row is a run of the stream, read as a ring


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=12), start=st.integers(0, 100), seed=st.integers(0, 9))
def test_rows_do_not_depend_on_chunking(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], start: int, seed: int
) -> None:
    """Spans several epochs: 25 samples each, from any start."""
    folder = tmp_path_factory.mktemp("c")
    blend = f"{corpus(folder, [60, 41])}:0.3,{corpus(folder, [99], 'd', 1000)}:0.7"
    for spec in (str(folder / "c"), blend):
        samples = open_samples(spec, seq_len=4, seed=seed)
        whole = samples.rows(start, sum(cuts))
        again = open_samples(spec, seq_len=4, seed=seed)
        parts, at = [], start
        for cut in cuts:
            parts.append(again.rows(at, cut))
            at += cut
        assert np.array_equal(whole, np.concatenate(parts))
        assert whole.dtype == np.int64 and whole.shape == (sum(cuts), 5)


def test_epochs_differ_in_order_and_offset_and_seeds_differ(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [1000])
    samples = open_samples(prefix, seq_len=16, seed=1)
    n = samples.epoch_size
    epochs = [samples.rows(epoch * n, n) for epoch in range(6)]
    assert len({int(rows[:, 0].min()) % 16 for rows in epochs}) > 1
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], open_samples(prefix, seq_len=16, seed=2).rows(0, n))
    assert np.array_equal(epochs[0], open_samples(prefix, seq_len=16, seed=1).rows(0, n))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=30), seq_len=st.integers(1, 12),
       seed=st.integers(0, 99), part=st.sampled_from(["train", "valid"]))
def test_documents_begin_where_the_index_says(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, seed: int, part: str
) -> None:
    lengths = [*lengths, 13, 13]
    prefix = corpus(tmp_path_factory.mktemp("c"), lengths)
    samples = open_samples(prefix, seq_len=seq_len, seed=seed, part=part, valid_fraction=0.01)
    count = 2 * samples.epoch_size + 1
    rows, begins = samples.rows(0, count), samples.begins(0, count)
    starts = np.cumsum([0, *lengths])  # token i of this corpus is i
    np.testing.assert_array_equal(begins, np.isin(rows, starts))


def test_documents_of_several_sequences_begin_once(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", 60000) as writer:
        writer.add_documents(np.arange(20), np.array([5, 5, 10]), np.array([2, 1]))
        writer.finish()
    samples = open_samples(str(tmp_path / "c"), seq_len=4, seed=0)
    rows, begins = samples.rows(0, 10), samples.begins(0, 10)
    np.testing.assert_array_equal(begins, np.isin(rows, [0, 10]))


def test_a_blend_says_where_documents_begin(tmp_path: Path) -> None:
    one, other = corpus(tmp_path, [7] * 9, "a"), corpus(tmp_path, [11] * 9, "b", first=1000)
    samples = open_samples(f"{one}:0.5,{other}:0.5", seq_len=8, seed=0)
    rows, begins = samples.rows(0, 30), samples.begins(0, 30)
    wanted = np.where(rows < 1000, rows % 7 == 0, (rows - 1000) % 11 == 0)
    np.testing.assert_array_equal(begins, wanted)


def test_order_is_pinned(tmp_path: Path) -> None:
    """A change here makes every run resume into other data: it must be deliberate."""
    rows = open_samples(corpus(tmp_path, [101]), seq_len=10, seed=7).rows(8, 6)
    assert rows[:, 0].tolist() == [39, 89, 6, 16, 96, 66]


def test_train_and_valid_are_whole_documents_and_share_none(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [50, 50, 50, 50])
    train = open_samples(prefix, seq_len=5, seed=0, part="train", valid_fraction=0.25)
    valid = open_samples(prefix, seq_len=5, seed=0, part="valid", valid_fraction=0.25)
    assert (train.tokens, valid.tokens) == (150, 50)
    assert train.rows(0, 90).max() < 150 <= valid.rows(0, 30).min()


def test_valid_part_has_at_least_one_document(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [50, 50])
    assert open_samples(prefix, seq_len=5, seed=0, part="valid", valid_fraction=0.001).tokens == 50
    assert open_samples(prefix, seq_len=5, seed=0, valid_fraction=0.0).tokens == 100


def test_part_too_short_gives_the_numbers(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [20, 8])
    with pytest.raises(UserError, match="valid part .* has 8 tokens .* 28, fewer than the 11"):
        open_samples(prefix, seq_len=10, seed=0, part="valid", valid_fraction=0.5)
    with pytest.raises(UserError, match="valid part .* has 0 tokens"):
        open_samples(prefix, seq_len=10, seed=0, part="valid")
    assert open_samples(prefix, seq_len=27, seed=0).epoch_size == 1


def test_ids_past_the_vocabulary_are_seen_when_read(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [100])
    open_samples(prefix, seq_len=10, seed=0, vocab_size=100).rows(0, 10)
    with pytest.raises(UserError, match="token id 99 is outside the vocabulary of 99"):
        open_samples(prefix, seq_len=10, seed=0, vocab_size=99).rows(0, 20)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_corpus_that_changes_under_a_run_stops_it(tmp_path: Path, suffix: str, documents: bool) -> None:
    blend = f"{corpus(tmp_path, [100])}:0.5,{corpus(tmp_path, [100], 'd')}:0.5"
    samples = open_samples(blend, seq_len=10, seed=0)
    samples.rows(0, 4)
    with open(tmp_path / f"d{suffix}", "r+b") as file:
        file.truncate(60)
    with pytest.raises(UserError, match=f"d{suffix} "):
        samples.begins(4, 4) if documents else samples.rows(4, 4)


WEIGHTS = st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS)
def test_blend_keeps_proportions_at_every_prefix(weights: list[float]) -> None:
    _check_blend([Fraction(weight) for weight in weights], 1.0)


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1.0), min_size=5, max_size=12))
def test_blend_of_many_keeps_its_stated_bound(weights: list[float]) -> None:
    blend = Blend([Fraction(weight) for weight in weights])
    assert blend.error_bound < 1.5
    _check_blend([Fraction(weight) for weight in weights], blend.error_bound + 1e-6)


def _check_blend(weights: list[Fraction], bound: float) -> None:
    count = 3000
    source, index = Blend(weights).locate(np.arange(count))
    for number, weight in enumerate(weights):
        mine = source == number
        assert np.array_equal(index[mine], np.arange(mine.sum()))  # no sample of a corpus is skipped or repeated
        ideal = np.arange(1, count + 1) * float(weight / sum(weights))
        assert np.abs(np.cumsum(mine) - ideal).max() < bound


@pytest.mark.parametrize("weight", ["0.999999999", "0.000000001", "0.5"])
def test_blend_weights_near_0_and_1_hold_far_out(weight: str) -> None:
    rest = Fraction(1) - Fraction(weight)
    blend = Blend([Fraction(weight), rest])
    for start in (0, 10**9 - 5, 10**12):
        ks = np.arange(start, start + 1000)
        source, index = blend.locate(ks)
        before = np.where(source == 0, index, ks - index)  # samples of corpus 0 before sample k
        assert np.abs(before - np.array([float(Fraction(int(k)) * Fraction(weight)) for k in ks])).max() < 1.0


def test_blend_reads_each_corpus_in_its_own_order(tmp_path: Path) -> None:
    one, two = corpus(tmp_path, [200]), corpus(tmp_path, [300], "d", 1000)
    rows = open_samples(f"{one}:0.7,{two}:0.3", seq_len=10, seed=3).rows(0, 100)
    from_one = rows[rows[:, 0] < 1000]
    assert len(from_one) == 70
    assert np.array_equal(from_one, open_samples(one, seq_len=10, seed=3).rows(0, 70))
    assert np.array_equal(rows[rows[:, 0] >= 1000], open_samples(two, seq_len=10, seed=3).rows(0, 30))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a:0.5,b", "is not PREFIX:WEIGHT"),
        ("a:0.5,,b:1", "is not PREFIX:WEIGHT"),
        ("a:0.5,b:x", 'weight "x" of b is not a number'),
        ("a:0.5,b:nan", "is not a number"),
        ("a:0.5,b:inf", "is not a number"),
        ("a:0.5,b:1/0", "is not a number"),
        ("a:0.5,b:0", "must be above 0"),
        ("a:0.5,b:1e-999999999", "must be above 0"),
        ("a:-1", "must be above 0"),
        ("a:0.5,a:0.5", "named twice"),
        (":1", "is not PREFIX:WEIGHT"),
        ("", "empty"),
    ],
)
def test_bad_blend_is_named(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_spec(spec)


def test_a_prefix_with_a_colon_or_comma_is_found_when_it_exists(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [100], "a,b:1")
    assert parse_spec(prefix) == [(prefix, Fraction(1))]
    assert open_samples(prefix, seq_len=4, seed=0).tokens == 100


def test_a_blend_of_hundreds_is_made_at_once() -> None:
    """Looking for a better tree took minutes from sixty on; and a file's name cannot be as long as the whole spec."""
    names = [f"corpus-{number:03d}" for number in range(300)]
    spec = parse_spec(",".join(f"{name}:{number % 17 + 1}" for number, name in enumerate(names)))
    assert [name for name, _ in spec] == names
    blend = Blend([weight for _, weight in spec])
    assert blend.error_bound < 2
    _check_blend([weight for _, weight in spec], blend.error_bound + 1e-6)


@pytest.mark.parametrize("bad", [{"seq_len": 0}, {"part": "test"}, {"valid_fraction": 1.0}, {"valid_fraction": -0.1}])
def test_bad_settings_are_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    settings_ = {"seq_len": 4, "seed": 0} | bad
    with pytest.raises(UserError):
        open_samples(corpus(tmp_path, [100]), **settings_)  # type: ignore[arg-type]
