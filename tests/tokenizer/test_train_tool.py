"""tools/train_tokenizer.py: what it prints and leaves, and bad input in one line with exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_tokenizer.py"
NAMES = [one + two for one in "ka lo mi tu re san der ing ough ble".split() for two in "ra lin mo tus bre xa".split()]
TEXTS = [f"row {n}: {NAMES[n % 60]}, {NAMES[n * 7 % 60]} and others\n\tat 数学" for n in range(300)]
LINES = [json.dumps({"text": text}) for text in TEXTS]
FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "training.json"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(LINES))
    return path


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    """Runs the tool."""
    return subprocess.run([sys.executable, TOOL, *map(str, flags)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_one_command_gives_a_vocabulary_and_its_report(corpus: Path, tmp_path: Path, model: str) -> None:
    out = tmp_path / "runs" / "tokenizer"
    done = run("--input", corpus.parent, "--vocab-size", 340, "--output", out, "--model", model)
    assert done.returncode == 0, done.stderr
    assert "read 300 documents" in done.stdout and "(all of it)" in done.stdout
    assert "340 pieces; 100.0000% of characters" in done.stdout and "\nLatin " in done.stdout
    assert "gives the ids of tokenizer.model on all of 300 documents compared" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == FILES
    about = json.loads((out / "training.json").read_text())
    assert about["inputs"] == [{"path": str(corpus), "bytes": corpus.stat().st_size}]
    assert about["read"]["documents"] == 300 and about["sampling"]["seed"] == 1234
    assert load_tokenizer(str(out)).vocab_size == 340


def test_an_input_whose_name_is_not_utf8_is_named_in_the_report(corpus: Path, tmp_path: Path) -> None:
    try:
        odd = corpus.rename(os.fsdecode(os.fsencode(corpus.parent) + b"/\xff.jsonl"))
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    done = run("--input", corpus.parent, "--vocab-size", 340, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "training.json").read_text("utf-8"))["inputs"][0]["path"] == str(odd)


def test_a_sample_is_drawn_and_said(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("".join(f"line {n} of a text that is longer than the sample\n" for n in range(60_000)))
    flags = ("--input", source, "--split-text", "line", "--vocab-size", 300, "--sample-megabytes", 1, "--seed", 7)
    done = [run(*flags, "--output", tmp_path / name) for name in ("one", "two")]
    assert all("sampled" in one.stdout and "1.0 MB (seed 7)" in one.stdout for one in done)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_skipped_records_are_named_and_counted(corpus: Path, tmp_path: Path) -> None:
    corpus.write_text("\n".join([*LINES[:200], '{"text": "\\ud800"}', *LINES[200:]]))
    flags = ("--input", corpus, "--vocab-size", 320, "--output", tmp_path / "out")
    stopped = run(*flags)
    assert stopped.returncode == 2 and "corpus.jsonl:201: " in stopped.stderr and not (tmp_path / "out").exists()
    done = run(*flags, "--on-error", "skip")
    assert done.returncode == 0 and "0 empty, 1 bad" in done.stdout
    assert done.stderr.startswith("skipped ") and "corpus.jsonl:201: " in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "5"], "of 5 cannot be trained"),
        (["--vocab-size", "99999"], "lower --vocab-size to"),
        (["--special", "<a>,<a>"], "given twice"),
        (["--special", "<a>,,<b>"], "empty"),
        (["--special", "others"], "is text"),
        (["--encoding", "utf-88"], "did you mean utf-8"),
        (["--json-key", "body"], 'no "body"; the row has text'),
        (["--sample-megabytes", "0"], "must be at least 1"),
        (["--input", "nowhere/*.jsonl"], "no file matches"),
        (["--input", str(TOOL)], "ends in .py"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(
    corpus: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    done = run("--input", corpus, "--vocab-size", 340, "--output", tmp_path / "out", *flags)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_holds_something_is_kept_unless_told(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    flags = ("--input", corpus, "--vocab-size", 340, "--output", out)
    done = run(*flags)
    assert done.returncode == 2 and "is not empty (notes.txt)" in done.stderr and "--overwrite" in done.stderr
    assert run(*flags, "--overwrite").returncode == 0
    assert (out / "notes.txt").read_text() == "mine" and (out / "tokenizer.model").exists()


def test_outputs_that_cannot_be_are_refused_before_reading(corpus: Path, tmp_path: Path) -> None:
    flags = ("--input", corpus, "--vocab-size", 340)
    assert "is a file" in run(*flags, "--output", corpus).stderr
    assert "is a file" in run(*flags, "--output", corpus / "below").stderr
    own = tmp_path / "own" / "tokenizer.json"
    own.parent.mkdir()
    own.write_text("\n".join(LINES))
    done = run("--input", own, "--vocab-size", 340, "--output", own.parent, "--overwrite")
    assert done.returncode == 2 and "is an input and would be overwritten" in done.stderr
    if os.geteuid() != 0:  # root may write anywhere
        own.parent.chmod(0o500)
        assert "no permission to write" in run(*flags, "--output", own.parent / "new").stderr


def test_interrupted_it_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    with open(source, "w") as file:
        for n in range(40_000):
            file.write(f"{n * 7919 % 104729:x} {n * 104729 % 7919:x} {n * n % 1299709:x} words of any kind\n")
    flags = f"--input {source} --split-text line --vocab-size 6000 --model unigram --output {tmp_path / 'o'}".split()
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, TOOL, *flags], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("training a unigram vocabulary"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.strip() == "interrupted: nothing is written"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
