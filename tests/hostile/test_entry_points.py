"""Hostile inputs to every entry point and tool: exit code 2, one line, nothing written, nothing left running."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.idle import default_values

sys.path.insert(0, str(Path(__file__).parent))
import attack  # noqa: E402

# The launcher library asks for a file descriptor that captured output does not have.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Unable to enable fault handler")]
LONG = "x" * 6000
NAME = "x" * 256
ESCAPES = "\x1b[31mred\nline\r\x07"
VALUES = ("", LONG, "nan", "-1", "1e18", "1e300", ESCAPES, "0\0", "../" * 400, "é中" * 200, "0", "9" * 5000, "\udcff",
          "2", "0.5")
"""What a flag is given, whatever its type."""
SMALL = ("--hidden 32 --ffn-hidden 64 --heads 4 --kv-heads 2 --layers 2 --vocab-size 640 --seq-len 32 --global-batch 4 "
         "--micro-batch 2").split()

TABLE: list[tuple[str, str, str]] = [
    ("pretrain", "--config {zero}", "larger than 1 MiB"), ("pretrain", "--config {folder}", "Is a directory"),
    ("pretrain", "--config {name}", "File name too long"), ("pretrain", "--config {binary}", "is not YAML"),
    ("pretrain", "--data {name}", ""),
    ("pretrain", "--data {long}", ""),
    ("pretrain", "--data {corpus} --out {name}", ""),
    ("pretrain", "--data {corpus} --out {file}", "is not a folder"),
    ("pretrain", "--data {corpus} --out {file}/a/b", "is not a folder"),
    ("pretrain", "--data {corpus} --out /proc/x/y", "cannot be written"),
    ("pretrain", "--data {corpus},{corpus}", "is not PREFIX:WEIGHT"),
    ("pretrain", "--data {corpus}:nan", "not a number"),
    ("pretrain", "--data {corpus} --timeout 1e18", "at most 31536000"),
    ("pretrain", "--data {corpus} --load {file}", "is not a folder"), ("pretrain", "--load {zero}", "is not a folder"),
    ("pretrain", "--data {corpus} --load {name}", ""), ("pretrain", "--data {corpus} --tokenizer {name}", ""),
    ("pretrain", "--data {corpus} --tokenizer {zero}", ""), ("pretrain", "--data {corpus} --tokenizer {binary}", ""),
    ("pretrain", "--data {binary}", ""), ("pretrain", "--data {corpus} --resume --out {name}", ""),
    ("pretrain", "--cp 2", "--cp 2: context parallelism"), ("pretrain", "--lora 8", "LoRA is not there yet"),
    ("pretrain", "--data {corpus} --global-batch 1e15", "beyond any run"),
    ("pretrain", "--data {corpus} --layers 1e9", ""),
    ("finetune", "--load {run} --data {zero}", ""), ("finetune", "--load {run} --data {name}", ""),
    ("finetune", "--load {run} --data {binary}", ""), ("finetune", "--load {run} --data {folder}", ""),
    ("finetune", "--load {run} --data {long}", ""),
    ("finetune", "--load {folder} --data {rows}", "is not a checkpoint"),
    ("finetune", "--load {run} --data {empty}", ""), ("finetune", "--load {run} --data {rows} --out {file}", ""),
    ("verify", "--data {corpus}", "--data: verification trains on"), ("verify", "--dtype bf16", "fp64 or fp32"),
    ("verify", "--seq-len 1e9", ""), ("verify", "--config {zero}", "larger than 1 MiB"),
    ("generate", "--load {run} --prompt a --max-tokens 1e18", "is not a whole number"),
    ("generate", "--load {run} --prompt a --max-tokens 0", "max-tokens 0"),
    ("generate", "--load {run} --prompt a --temperature nan", "'nan' is not a number"),
    ("generate", "--load {run} --prompt a --top-p 2", "top-p 2.0 is not"),
    ("generate", "--load {zero} --prompt a", "is not a folder"), ("generate", "--load {name} --prompt a", ""),
    ("generate", "--load {long} --prompt a", ""), ("generate", "--load {folder} --prompt a", "is not a checkpoint"),
    ("generate", "--load {run} --prompt a --max-new-tokens 3", "which is --max-tokens here"),
    ("generate", "--load {run} --prompt \udcff", "not UTF-8"),
    ("convert_ckpt", "--load {run} --save {file}", ""), ("convert_ckpt", "--load {run} --save {name}", ""),
    ("convert_ckpt", "--load {name} --save {new}", ""), ("convert_ckpt", "--load {binary} --save {new}", ""),
    ("convert_ckpt", "--load {run} --save {new} --shard-gb nan", "is not a number"),
    ("convert_ckpt", "--load {run} --save {new} --to gguf", "use hf, engine"),
    ("convert_ckpt", "--load {run} --save {new} --target-tp 2", "any tp and pp reads it"),
    ("inspect_data", "{name}", ""), ("inspect_data", "{long}", ""), ("inspect_data", "{binary}", ""),
    ("inspect_data", "{corpus} --doc 1e9", ""), ("inspect_data", "{corpus} --doc -1", "no document -1"),
    ("inspect_data", "{corpus} --tokenizer {zero}", ""), ("inspect_data", "{corpus} --tokenizer {name}", ""),
    ("make_demo_data", "--output {file}", ""), ("make_demo_data", "--output {name}", ""),
    ("make_demo_data", "--output {new} --megabytes -1", "must be above 0"),
    ("make_demo_data", "--output {new} --megabytes nan", "is not a number"),
    ("merge_datasets", "--input {corpus} {name} --output-prefix {new}", ""),
    ("merge_datasets", "--input {corpus} {binary} --output-prefix {new}", ""),
    ("merge_datasets", "--input {corpus} {missing} --output-prefix {name}", ""),
    ("merge_datasets", "--input {corpus} --output-prefix {file}/x", ""),
    ("preprocess_data", "--input {name} --tokenizer {tokenizer} --output-prefix {new}", ""),
    ("preprocess_data", "--input {long} --tokenizer {tokenizer} --output-prefix {new}", ""),
    ("preprocess_data", "--input {zero} --tokenizer {tokenizer} --output-prefix {new}", ""),
    ("preprocess_data", "--input {text} --tokenizer {zero} --output-prefix {new}", ""),
    ("preprocess_data", "--input {text} --tokenizer {name} --output-prefix {new}", ""),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {name}", ""),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {file}/x", ""),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --workers 0", "at least 1"),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --workers 1e18", "whole number"),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --unit-megabytes 0",
     "at least 1"),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --json-key", "expected one"),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --encoding {long}", ""),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --dedup fuzzy", ""),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --quality {long}", ""),
    ("preprocess_data", "--input {text} --tokenizer {tokenizer} --output-prefix {new} --report {file}/r", ""),
    ("train_tokenizer", "--input {name} --vocab-size 300 --output {new}", ""),
    ("train_tokenizer", "--input {zero} --vocab-size 300 --output {new}", ""),
    ("train_tokenizer", "--input {text} --vocab-size 1e18 --output {new}", "whole number"),
    ("train_tokenizer", "--input {text} --vocab-size -5 --output {new}", ""),
    ("train_tokenizer", "--input {text} --vocab-size 99999999 --output {new}", ""),
    ("train_tokenizer", "--input {text} --vocab-size 300 --output {name}", ""),
    ("train_tokenizer", "--input {text} --vocab-size 300 --output {file}", ""),
    ("train_tokenizer", "--input {text} --vocab-size 300 --output {new} --special {long}", ""),
    ("train_tokenizer", "--input {text} --vocab-size 300 --output {new} --seed 99999999999999999999", "64 bits"),
    ("train_tokenizer", "--input {text} --vocab-size 300 --output {new} --sample-megabytes 0", ""),
]
"""Program, flags, and words of the line; the names in braces are paths (`places`)."""


@pytest.fixture
def places(chain: Any, tmp_path: Path) -> dict[str, str]:
    """What the table's names stand for."""
    (tmp_path / "file").write_text("a file of the user's\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(os.urandom(4096))
    (tmp_path / "text.txt").write_text("some words\n" * 50)
    (tmp_path / "folder").mkdir()
    made = {"corpus": "corpus", "tokenizer": "tokenizer", "rows": "rows.jsonl", "run": "run"}
    return {**{name: str(chain.folder / path) for name, path in made.items()},
            **{name: str(tmp_path / name) for name in ("file", "empty", "binary", "folder", "new", "missing")},
            "text": str(tmp_path / "text.txt"), "name": str(tmp_path / NAME), "long": LONG, "zero": "/dev/zero"}


@pytest.mark.parametrize(("program", "flags", "words"), TABLE, ids=lambda text: ascii(text)[1:61])
def test_a_hostile_start_is_refused_in_one_line(
        program: str, flags: str, words: str, places: dict[str, str], chain: Any, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    argv = [word.format(**places) for word in flags.split()]
    if program == "pretrain" and "--load" not in argv:
        argv = [*SMALL, *argv]
    assert words in attack.refused(program, argv, capsys, tmp_path, chain.folder)


@pytest.mark.soak
@pytest.mark.parametrize("program", ["pretrain", "finetune", "verify"])
@pytest.mark.parametrize("name", default_values())
def test_whatever_a_flag_is_given_a_check_ends_in_a_verdict_or_one_line(
        name: str, program: str, chain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flag = f"--{name.replace('_', '-')}"
    usual = {"pretrain": [*SMALL, "--data", str(chain.folder / "corpus")], "verify": ["--steps", "2"],
             "finetune": ["--load", str(chain.folder / "run"), "--data", str(chain.folder / "rows.jsonl"),
                          "--seq-len", "32"]}[program]
    if flag in ("--data", "--load") and flag in usual:
        del usual[usual.index(flag) : usual.index(flag) + 2]
    codes = [attack.start(program, [*usual, "--check", f"{flag}={value}"], capsys, tmp_path)[0] for value in VALUES]
    assert set(codes) <= {0, 2} and 2 in codes


@pytest.mark.parametrize("program", ["generate", *attack.TOOLS])
def test_a_program_without_flags_says_what_it_needs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--" in attack.refused(program, [], capsys, tmp_path) or program == "inspect_data"
    assert "did you mean" in attack.refused(program, ["--helpp"], capsys, tmp_path)
    assert "characters more" in attack.refused(program, [f"--{LONG}"], capsys, tmp_path)
