"""Cleaning: what goes, what stays, and that a second pass finds nothing to do."""

from __future__ import annotations

import itertools
import pickle
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.clean import Cleaner

EVERY = "".join(map(chr, range(0x110000)))
CHOICES = [Cleaner(nfc=n, control=c, whitespace=w) for n, c, w in itertools.product((False, True), repeat=3)]
ODD = st.text(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from("ab \t\n\r\v\f\x00\x1f\x7f\x85\u00a0\u00ad\u2000\u2028\u2029\u200b\u200d\u3000\ufeff\ufffe"),
        st.sampled_from("e\u0301\u0316\u0344\u0958\u1100\u1161\u11a8\u212b\ufb01\U0001fffe\U0001f468"),
    ),
    max_size=40,
)


def cleaner(name: str) -> Cleaner:
    return Cleaner(**{name: True})


@given(ODD, st.sampled_from(CHOICES))
@settings(deadline=None, max_examples=500)
def test_cleaning_twice_is_cleaning_once(text: str, chosen: Cleaner) -> None:
    once = chosen.clean(text)
    assert chosen.clean(once) == once


@given(ODD)
@settings(deadline=None, max_examples=300)
def test_every_step_keeps_its_promise_when_all_run(text: str) -> None:
    done = Cleaner(nfc=True, control=True, whitespace=True).clean(text)
    assert unicodedata.is_normalized("NFC", done)
    assert not regex.search(r"[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\p{NChar}--[\n\t]]", done, regex.V1)
    assert not regex.search(r"[\p{Zs}--[ ]]|[ \t]$|\n\n\n|\A\n|\n\Z|[^ \t\n]\ {2}", done, regex.V1 | regex.M)
    done.encode("utf-8")


@given(ODD)
@settings(deadline=None)
def test_nothing_changes_that_was_not_chosen(text: str) -> None:
    assert Cleaner().clean(text) == text
    assert not Cleaner() and Cleaner(nfc=True)
    letters = regex.compile(r"[\p{L}\p{N}\p{P}\p{S}]")
    assert letters.findall(Cleaner(control=True, whitespace=True).clean(text)) == letters.findall(text)


def test_control_takes_out_these_characters_and_no_others() -> None:
    """Over all of Unicode."""
    done = cleaner("control").clean(" ".join(EVERY)).split(" ")
    done[32:34] = [" "]  # the space itself came back as two empty strings
    gone = {ord(before) for before, after in zip(EVERY, done, strict=True) if not after}
    changed = {ord(before): after for before, after in zip(EVERY, done, strict=True) if after not in ("", before)}
    properties = regex.compile(r"[[\p{Cc}\p{Cs}\p{NChar}]--[\t\n\r\v\f\x85]]", regex.V1)
    named = "\u00ad\u2060\ufeff\u206a\u206b\u206c\u206d\u206e\u206f\ufff9\ufffa\ufffb"
    assert gone == set(map(ord, properties.findall(EVERY))) | set(map(ord, named))
    assert changed == dict.fromkeys(map(ord, "\r\v\f\x85"), "\n")


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
        "\u0915\u094d\u200d\u0937 and \u0646\u0645\u06cc\u200c\u062f\u0627\u0646\u0645",
        "ไทย\u200bภาษา",
        "\u202babc\u202c \u200e\u200f \u2066x\u2069",
        "\u2764\ufe0f \U0001f3f4\U000e0067\U000e0062\U000e007f \ue000 \ufffd",
        "tab\tseparated\n\n    indented code\n\tand more",
    ],
)
def test_what_carries_meaning_stays(text: str) -> None:
    assert Cleaner(nfc=True, control=True, whitespace=True).clean(text) == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\r\nb\rc\vd\fe\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh"),
        ("a\u00a0b\u2009c\u3000d\u202fe", "a b c d e"),
        ("a  b   c    d", "a b c d"),
        ("a \t \nb\t\nc   ", "a\nb\nc"),
        ("a\n \n\t\n\n\nb", "a\n\nb"),
        ("\n\n  a\n\n", "  a"),
        ("if x:\n    y  =  1\n\tz", "if x:\n    y = 1\n\tz"),
        ("\u3000\u3000第一段", "  第一段"),
        ("a\tb\t\tc", "a\tb\t\tc"),
        (" \n\t\r\n ", ""),
        ("", ""),
    ],
)
def test_whitespace(before: str, after: str) -> None:
    assert cleaner("whitespace").clean(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("\ufeffa\x00b\x1bc\x7f", "abc"),
        ("one\r\ntwo\rthree\fpage", "one\ntwo\nthree\npage"),
        ("co\u00adop\u2060era\ufefftion", "cooperation"),
        ("a\ud800b", "ab"),
        ("x\U0010ffffy\U0001fffez\ufdd0", "xyz"),
        ("tab\tstays\n", "tab\tstays\n"),
    ],
)
def test_control(before: str, after: str) -> None:
    assert cleaner("control").clean(before) == after


def test_a_mark_meets_its_letter_when_what_stood_between_is_gone() -> None:
    assert Cleaner(nfc=True, control=True).clean("e\u00ad\u0301") == "\u00e9"
    assert cleaner("nfc").clean("e\u0301 \u212b \ufb01 \uff21") == "\u00e9 \u00c5 \ufb01 \uff21"


@pytest.mark.parametrize(
    "text",
    [
        "a" + "\u0301\u0316" * 300_000,
        "a" + "\u0301" * 300_000 + "\u0316" * 300_000,
        ("\u0316" * 500 + "e") * 4000,
        " " * 2_000_000 + "x" + " " * 2_000_000 + "y",
        " \t" * 1_000_000 + "x",
        "\n " * 1_000_000 + "x",
        "\r" * 1_000_000,
        "\x00" * 1_000_000,
    ],
    ids=["marks", "sorted marks", "runs of marks", "spaces", "tabs", "blank lines", "returns", "nulls"],
)
@pytest.mark.timeout(60)
def test_hostile_text_does_not_take_for_ever(text: str) -> None:
    """A pass whose time grows with the square of the length would take an hour for any of these."""
    done = Cleaner(nfc=True, control=True, whitespace=True).clean(text)
    assert done == Cleaner(nfc=True, control=True, whitespace=True).clean(done)


def test_marks_in_numbers_that_languages_use_are_composed() -> None:
    many = "o" + "\u0316" * 300 + "\u0302"
    assert cleaner("nfc").clean(many) == "\u00f4" + "\u0316" * 300
    assert cleaner("nfc").clean("a" * 1000 + "e\u0301" * 1000) == "a" * 1000 + "\u00e9" * 1000


def test_a_cleaner_travels_to_workers() -> None:
    chosen = Cleaner(nfc=True, control=True)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
