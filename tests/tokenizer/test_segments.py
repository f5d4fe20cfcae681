"""The table of segments remembers exactly what it was told, whatever the bytes."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from engine.tokenizer import segments
from engine.tokenizer.cut import _SEPARATORS, SPACE, _ends_of_words, _Joined
from engine.tokenizer.segments import PADDING, SegmentMemo, flat_ids, substrings

DTYPE = np.dtype("<i4")


class Model:
    """Ids of a segment: its length in bytes, then each character; counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ids(self, segment: str) -> list[int]:
        return [len(segment.encode()), *map(ord, segment)] if segment != "nothing" else []

    def __call__(self, buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked = substrings(buffer, starts, ends)
        self.asked += asked
        return flat_ids(map(self.ids, asked), DTYPE)


def look_up(memo: SegmentMemo, parts: list[str], codes: bool = False) -> list[list[int]]:
    encoded = [part.encode() for part in parts]
    bounds = np.cumsum([0, *map(len, encoded)])
    lone = np.array([ord(part) if len(part) == 1 else -1 for part in parts], "<i4") if codes else None
    ids, ends = memo.ids_of(b"".join(encoded) + PADDING, bounds, lone)
    return [ids[begin:end].tolist() for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def parts(rng: random.Random, number: int) -> list[str]:
    """Segments of every length, many of them prefixes of each other or of NULs."""
    kinds = ["a", "ab", "\0", "\0\0", "数", "🙂", "é", " ", "nothing"]
    return ["".join(rng.choices(kinds, k=rng.choice([1, 1, 2, 3, 8, 15, 20, 70]))) for _ in range(number)]


@pytest.mark.parametrize("codes", [False, True])
def test_ids_are_those_of_the_model_and_asked_for_once(codes: bool) -> None:
    rng, model = random.Random(0), Model()
    memo = SegmentMemo(model, DTYPE)
    for _ in range(30):
        sample = parts(rng, rng.choice([1, 10, 3000]))
        assert look_up(memo, sample, codes) == [model.ids(part) for part in sample]
    short = [one for one in model.asked if len(one.encode()) <= 55]
    assert len(short) == len(set(short)) > 4000


def test_every_length_up_to_and_over_the_longest_key() -> None:
    model = Model()
    memo = SegmentMemo(model, DTYPE)
    sample = [one * length for length in range(1, 80) for one in ("a", "\0", "\x01")]
    for _ in "cold", "warm":
        assert look_up(memo, sample) == [model.ids(part) for part in sample]


def test_of_long_segments_the_last_few_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_RECENT", 4)
    rulers = [letter * (64 + place) for place, letter in enumerate("-+=*~")]
    endless = "x" * 2000
    model = Model()
    memo = SegmentMemo(model, DTYPE)
    sample = [rulers[0], "a", endless, rulers[1], rulers[0], endless, "b"]
    for _ in range(3):
        assert look_up(memo, sample) == [model.ids(part) for part in sample]
    assert sorted(model.asked) == sorted([rulers[0], rulers[1], "a", "b", *[endless] * 3])
    model.asked.clear()
    for part in [*rulers[1:], rulers[1], rulers[0], rulers[1], rulers[2]]:  # a fifth pushes out the oldest
        assert look_up(memo, [part]) == [model.ids(part)]
    assert model.asked == [*rulers[2:], rulers[0], rulers[2]]


def test_keys_that_all_fall_on_one_slot_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments.Table, "_home", lambda self, keys: np.zeros(len(keys), np.int64))
    model = Model()
    memo = SegmentMemo(model, DTYPE)
    sample = [f"{number}" for number in range(300)] * 2
    for _ in "cold", "warm":
        assert look_up(memo, sample) == [model.ids(part) for part in sample]


def test_a_model_that_fails_leaves_nothing_behind() -> None:
    model = Model()

    def failing(buffer: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if b"bad" in buffer:
            raise ValueError("bad")
        return model(buffer, starts, ends)

    memo = SegmentMemo(failing, DTYPE)
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            look_up(memo, ["good", "bad", "数"], codes=True)
    assert look_up(memo, ["good", "数"], codes=True) == [model.ids("good"), model.ids("数")]


def test_a_full_memo_starts_anew() -> None:
    rng, model = random.Random(1), Model()
    memo = SegmentMemo(model, DTYPE, limit_bytes=1 << 20)
    for number in range(60):
        sample = [*parts(rng, 200), *(f"{number}-{place}" for place in range(400))]
        assert look_up(memo, sample) == [model.ids(part) for part in sample]
        assert memo.nbytes_next <= 1 << 20
    assert len(set(model.asked)) < len(model.asked)


def test_words_end_at_signs_that_no_piece_has_behind_a_letter() -> None:
    ends = _ends_of_words({(" ", "a"), ("a", ","), ("1", "\n"), (".", "!"), ("é", "?")})
    for text, words in {"ab cd": ["ab", " cd"], "a  b ": ["a", "  b", " "], "a,b.c": ["a,b", ".c"],
                        "a.!": ["a", ".!"], "x?é?": ["x", "?é?"], "é b": ["é", " b"], "1\n2\t": ["1\n2", "\t"],
                        "a": ["a"], "": [""]}.items():  # fmt: skip
        raw = text.encode()
        at = np.flatnonzero(ends(raw)).tolist()
        assert [raw[begin:end].decode() for begin, end in pairwise([0, *at, len(raw)])] == words


def test_segments_are_encoded_together_whatever_control_characters_they_hold() -> None:
    """Each character is a token, but for one separator that makes two and one that a piece joins."""
    calls: list[list[str]] = []

    def encode(texts: list[str]) -> list[list[int]]:
        calls.append(texts)
        return [[number for one in text for number in ([1, 2] if one == "\x1f" else [ord(one)])] for text in texts]

    both = _Joined(encode, {("a", "b"), ("\n", "\x1e")}, DTYPE)
    words = [f" w{number}é数" for number in range(250)]
    for inside in ["", *map(chr, _SEPARATORS), "".join(map(chr, _SEPARATORS))]:
        raw = [(word + inside).encode() for word in words]
        stops = np.cumsum(list(map(len, raw)))
        calls.clear()
        ids, ends = both(b"".join(raw) + PADDING, stops - list(map(len, raw)), stops)
        shown = [(word + inside).replace(" ", SPACE) for word in words]
        assert [part.tolist() for part in np.split(ids, ends)[:-1]] == encode(shown)
        assert len(calls[0]) == (3 if len(inside) < 2 else 250)
        if len(inside) < 2:
            assert "\x1e" not in calls[0][0] or inside == "\x1e"
