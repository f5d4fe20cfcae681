"""Training a vocabulary: nothing of the text is lost, both files give the same ids, the same text the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.tokenizer import load_tokenizer
from engine.tokenizer.fast import FastTokenizer
from engine.tokenizer.sample import SampleSettings, draw_sample
from engine.tokenizer.train import TrainReport, sentences, train
from engine.tokenizer.train_json import SCORE_STEP

MODELS = ("bpe", "unigram")
SIZE = 480
SYLLABLES = "ka lo mi tu re san der ing ough st ble qua".split()
WORDS = [one + two for one in SYLLABLES for two in SYLLABLES] + (
    "the The function returns naïve café 1234 3.14 (a, b) don't 数学 语言 我们 中国 北京 мир שלום".split()
)
GAPS = [*" " * 12, "", "\n", "  ", ", ", "\n    ", "\t"]
TEXTS = [
    "".join(WORDS[(n * 7 + k * k) % len(WORDS)] + GAPS[(n + 3 * k) % len(GAPS)] for k in range(60)) for n in range(200)
]
STRANGE = [
    "", " ", "   ", "\n", "\n\n\n", " \n ", "\t\t", "\r\nCRLF\rCR", "a  b   c ", "e\u0301 \u00e9 ﬁ ｆｕ \u3000x\u3000",
    "def f(x):\n    return\n\n\n        # deep\n", "3.14 12,345", "🙂👩\u200d👧🇩🇪", "\u4dff \U00020000 \ufffd \0 \x01",
    "\u2585 \u2585", "x" * 300, " " * 300, "数" * 300, "<s>", "x</s>y", "<unk> @-@", "<pad>", "a<|im_start|>user\n",
    "<|im_end|>", "<0x41>", "<0x0A><0xFF> <0x", "<", "<|", "\u2028\x85\x1c\ufeff",
]  # fmt: skip
Trained = dict[str, tuple[Path, TrainReport]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small vocabulary of each kind."""
    found = {}
    for model in MODELS:
        folder = tmp_path_factory.mktemp(model) / "out"
        found[model] = folder, train(lambda: TEXTS, folder, vocab_size=SIZE, model=model)
    return found


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Real text: encyclopedia articles in both languages, and the web."""
    names = {"en": "wiki/enwiki-206pages.xml.bz2", "zh": "text/zhwiki_articles_a.jsonl", "web": "text/c4_demo.jsonl"}
    return {key: list(draw_sample(SampleSettings(inputs=[str(shared_data / name)])).texts())
            for key, name in names.items()}  # fmt: skip


def both(folder: Path) -> tuple[sentencepiece.SentencePieceProcessor, FastTokenizer]:
    """The two forms of a vocabulary."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return model, FastTokenizer(folder / "tokenizer.json", {})


# --- nothing is lost


@pytest.mark.parametrize("model", MODELS)
def test_whitespace_digits_and_unknown_characters_come_back(trained: Trained, model: str) -> None:
    tokenizer = load_tokenizer(str(trained[model][0]))
    for text in [*STRANGE, *TEXTS[:50]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.token_id(digit) for digit in "1234"]
    assert tokenizer.encode("x1234")[-4:] == digits and None not in digits
    assert len(tokenizer.encode("\u4dff")) == 4  # a space and three bytes


@pytest.mark.parametrize("model", MODELS)
def test_text_is_not_normalised(trained: Trained, model: str) -> None:
    tokenizer = load_tokenizer(str(trained[model][0]))
    assert tokenizer.encode("e\u0301") != tokenizer.encode("\u00e9")
    assert tokenizer.encode("ﬁ") != tokenizer.encode("fi")


CHARACTERS = st.one_of(st.sampled_from(" \n\t\u3000<|>/0x1sAa\u2581数\0"), st.characters(codec="utf-8"))


@given(text=st.one_of(st.text(CHARACTERS, max_size=60), st.lists(st.sampled_from(WORDS + GAPS + STRANGE)).map("".join)))
@settings(max_examples=300, deadline=None)
def test_both_forms_give_the_same_ids_on_any_text(trained: Trained, text: str) -> None:
    for folder, _ in trained.values():
        model, fast = both_cached(folder)
        ids = model.Encode(text)
        assert fast.encode(text) == ids
        assert fast.decode(ids) == model.Decode(ids)
        if "\u2581" not in text:
            assert model.Decode(ids) == text


_BOTH: dict[Path, tuple[sentencepiece.SentencePieceProcessor, FastTokenizer]] = {}


def both_cached(folder: Path) -> tuple[sentencepiece.SentencePieceProcessor, FastTokenizer]:
    """`both`, read once."""
    if folder not in _BOTH:
        _BOTH[folder] = both(folder)
    return _BOTH[folder]


@pytest.mark.parametrize("model", MODELS)
def test_control_pieces_in_text_stay_text_in_both_forms(trained: Trained, model: str) -> None:
    for tokenizer in both(trained[model][0]):
        encode = tokenizer.Encode if hasattr(tokenizer, "Encode") else tokenizer.encode
        for text in STRANGE:
            assert not set(encode(text)) & {0, 1, 2, 3, 4, 5}
        assert len(encode("<0x41>")) > 2


def test_long_lines_are_cut_behind_spaces_and_none_is_dropped() -> None:
    words = "many words " * 1000
    for text in (words, "数" * 5000 + "\n" + "short\n" * 3 + "x" * 10000 + words):
        pieces = list(sentences([text]))
        assert "".join(pieces) == text
        assert max(len(piece.encode()) for piece in pieces) <= 4192
        assert all(piece.endswith(" ") for piece in pieces[-2:])


def test_a_word_in_one_very_long_line_is_learned(tmp_path: Path) -> None:
    """sentencepiece would leave a line over 4,192 bytes out in silence."""
    train(lambda: ["zebra quagga " * 2000], tmp_path, vocab_size=285)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.token_id("\u2581zebra") is not None and tokenizer.token_id("\u2581quagga") is not None


def test_what_the_trainer_cannot_take_is_counted_and_the_rest_learned(tmp_path: Path) -> None:
    """It drops a sentence that holds U+2585 or NUL, and skips control pieces that are spelled out."""
    report = train(lambda: ["zebra\u2585 quagga\0 <s> <|im_end|> <0x41> </div> " * 40], tmp_path, vocab_size=295)
    assert (report.replaced, report.spelled) == (80, 120)
    model, _ = both(tmp_path)
    pieces = "\n".join(model.IdToPiece(number) for number in range(model.GetPieceSize()))
    assert "zebra" in pieces and "quagga" in pieces and "</" in pieces


# --- the two files are one vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_text_gets_the_same_ids_from_both_files(
    real: dict[str, list[str]], tmp_path: Path, model: str, language: str
) -> None:
    learned = real[language][:20]
    report = train(lambda: learned, tmp_path, vocab_size={"en": 1500, "zh": 4000}[language], model=model)
    assert report.compared and report.differing == 0 and report.json_written
    assert report.covered > (0.999 if language == "en" else 0.97)
    assert report.bytes_per_token > (2.5 if language == "en" else 2.8)
    ours, fast = both(tmp_path)
    others = [text for texts in real.values() for text in texts[:60]]
    for text in [*others, "\n".join(real["web"][:100])]:
        ids = ours.Encode(text)
        assert fast.encode(text) == ids
        assert ours.Decode(ids) == text


def test_scores_of_unigram_are_whole_steps_so_that_sums_are_exact(trained: Trained) -> None:
    model, _ = both(trained["unigram"][0])
    scores = [model.GetScore(number) / SCORE_STEP for number in range(model.GetPieceSize())]
    assert all(score == int(score) for score in scores) and len(set(scores)) > 30


def test_transformers_loads_a_unigram_vocabulary(trained: Trained) -> None:
    transformers = pytest.importorskip("transformers")
    folder = trained["unigram"][0]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    for text in [*TEXTS[:50], "a  b\n\tc", "数学 \U00020000"]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("number", [1, 20])
def test_a_tokenizer_json_that_differs_is_said_and_one_that_differs_often_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Here byte names have a score that lets them win over their spelling."""
    monkeypatch.setattr("engine.tokenizer.sp_json._NEVER", 0)
    report = train(lambda: TEXTS + ["<0x41>"] * number, tmp_path, vocab_size=SIZE, model="unigram")
    assert (report.compared, report.differing, report.json_written) == (200 + number, number, number == 1)
    assert (tmp_path / "tokenizer.json").exists() is (tmp_path / "tokenizer_config.json").exists() is (number == 1)


# --- the report


@pytest.mark.parametrize("model", MODELS)
def test_tokens_and_characters_of_the_scripts_add_up(trained: Trained, model: str) -> None:
    folder, report = trained[model]
    figures = report.figures
    assert sum(one.characters for one in figures.scripts) == sum(map(len, TEXTS))
    assert sum(one.tokens for one in figures.scripts) == figures.tokens
    assert figures.tokens == sum(map(len, map(load_tokenizer(str(folder)).encode, TEXTS)))
    assert figures.bytes == sum(len(text.encode()) for text in TEXTS) and figures.documents == len(TEXTS)
    assert {one.script for one in figures.scripts} >= {"Latin", "Han", "Cyrillic", "Hebrew", "digits", "whitespace"}


def test_characters_without_a_piece_are_counted_to_their_script(tmp_path: Path) -> None:
    rare = "".join(chr(0x4E00 + n) for n in range(200))
    report = train(lambda: ["the cat sat on the mat " * 600, rare], tmp_path, vocab_size=300)
    scripts = {one.script: one for one in report.figures.scripts}
    assert scripts["Latin"].covered == 1.0
    assert scripts["Han"].covered < 0.5 and scripts["Han"].bytes_per_token < 2


def test_training_json_tells_where_a_vocabulary_comes_from(trained: Trained) -> None:
    folder, report = trained["unigram"]
    about = json.loads((folder / "training.json").read_text())
    assert about["tokenizer"]["hash"] == load_tokenizer(str(folder)).hash
    assert about["settings"]["model"] == "unigram" and about["settings"]["vocab_size"] == SIZE
    assert about["made_by"]["sentencepiece"] == sentencepiece.__version__
    assert about["report"]["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert about["report"]["figures"]["bytes_per_token"] == report.bytes_per_token


# --- the same bytes


SCRIPT = """
import sys
from engine.tokenizer.train import train
from tests_texts import TEXTS
train(lambda: TEXTS, __import__("pathlib").Path(sys.argv[1]), vocab_size=int(sys.argv[3]), model=sys.argv[2])
"""


@pytest.mark.parametrize("model", MODELS)
def test_the_bytes_depend_on_no_process_hash_seed_or_number_of_cores(
    trained: Trained, model: str, tmp_path: Path
) -> None:
    (tmp_path / "tests_texts.py").write_text(f"TEXTS = {TEXTS!r}\n", encoding="utf-8")
    for number in (1, 2):
        one_core = number == 1 and hasattr(os, "sched_setaffinity")
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(number),
                       "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}  # fmt: skip
        prefix = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" if one_core else ""
        out = tmp_path / str(number)
        command = [sys.executable, "-c", prefix + SCRIPT, str(out), model, str(SIZE)]
        subprocess.run(command, env=environment, check=True, timeout=120)
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "training.json"):
            assert (out / name).read_bytes() == (trained[model][0] / name).read_bytes()


# --- bad requests


@pytest.mark.parametrize(
    ("size", "texts", "message"),
    [
        (5000, ["a b c"], r"of 5000 cannot .*: the text gives no more than \d+ pieces; lower --vocab-size to \d+"),
        (100, TEXTS, r"of 100 cannot be trained: .*need 263"),
        (0, TEXTS, "of 0 cannot be trained"),
        (-5, TEXTS, "of -5 cannot be trained"),
        (265, TEXTS, r"of 265 cannot be trained: the text's characters alone need \d+"),
        (300, [], "there is no text"),
        (300, ["", ""], "there is no text"),
        (300, ["\n\n", "\n"], "nothing but line ends"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_a_vocabulary_the_text_cannot_give_is_refused_with_numbers(
    tmp_path: Path, model: str, size: int, texts: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(lambda: texts, tmp_path / "t", vocab_size=size, model=model)
    assert "\n" not in str(caught.value) and not (tmp_path / "t").exists()


def test_the_largest_vocabulary_named_can_be_trained(tmp_path: Path) -> None:
    for model in MODELS:
        with pytest.raises(UserError) as caught:
            train(lambda: TEXTS[:20], tmp_path / model, vocab_size=9000, model=model)
        found = re.search(r"lower --vocab-size to (\d+)", str(caught.value))
        assert found
        most = int(found[1])
        assert train(lambda: TEXTS[:20], tmp_path / model, vocab_size=most, model=model).vocab_size == most


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (["<a>", "<b>", "<a>"], "'<a>' is given twice"),
        (["<a>", ""], "empty"),
        (["</s>"], "in every vocabulary already"),
        (["<0x41>"], "in every vocabulary already"),
        (["the"], r"'the' is text.*<\|the\|>"),
        (["数学"], "is text"),
        (["!"], "is text"),
        (["<a b>"], "a space"),
        (["<\u2581>"], "a space"),
        (["<\x07>"], "cannot be seen"),
        (["<" + "x" * 200 + ">"], "202 characters"),
    ],
)
def test_special_pieces_that_cannot_be_are_refused(tmp_path: Path, special: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(lambda: TEXTS, tmp_path / "t", vocab_size=SIZE, special=special)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("model", MODELS)
def test_special_pieces_of_any_script_are_control_pieces(tmp_path: Path, model: str) -> None:
    special = ["<|开始|>", "[INST]", "<é>"]
    train(lambda: TEXTS, tmp_path, vocab_size=SIZE, model=model, special=special)
    ours, fast = both(tmp_path)
    for number, piece in enumerate(special, 4):
        assert ours.IdToPiece(number) == piece and ours.IsControl(number) and fast.token_id(piece) == number
        assert fast.encode(f"x {piece}") == ours.Encode(f"x {piece}") and number not in ours.Encode(f"x {piece}")


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match="cannot write to .*No space left"):
        train(lambda: TEXTS, tmp_path / "a" / "b", vocab_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_vocabulary_is_replaced_whole(tmp_path: Path) -> None:
    make: Callable[[int], TrainReport] = lambda size: train(lambda: TEXTS, tmp_path, vocab_size=size)  # noqa: E731
    make(400)
    make(420)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "training.json"]  # fmt: skip
    ours, fast = both(tmp_path)
    assert ours.GetPieceSize() == fast.vocab_size == 420
