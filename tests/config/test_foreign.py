"""Flags of other tools are answered with ours, typing errors with the nearest, and neither with a wrong guess."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from engine import generate
from engine.config import describe, parse
from engine.config.command import Command
from engine.config.foreign import RUN, Table
from engine.config.foreign_tools import TOOLS
from engine.errors import UserError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def fault(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv)
    return str(caught.value)


@pytest.mark.parametrize(("flag", "answer"), [
    ("--lora", "unknown option --lora: LoRA is not there yet"), ("--dropout", "dropout is not there yet"),
    ("--batch-size", "which is --global-batch here"), ("--num-experts", "experts are not there yet"),
    ("--tensor-model-parallel-size", "which is --tp here"), ("--train-iters", "which is --steps here"),
    ("--lr-decay-style", "which is --decay here (cosine, linear or constant"),
    ("--learning_rate", "unknown option --learning_rate, which is --lr here"),
    ("--no-masked-softmax-fusion", "which is --kernels here"), ("--per_device_train_batch_size", "--micro-batch here"),
    ("--warmup-ratio", "which is --warmup here (in steps: the share x --steps)"),
    ("--nproc-per-node", "torchrun --nproc-per-node N"), ("--bf16", "which is --dtype bf16 here"),
    ("--stpes", "did you mean --steps?"), ("--micro-bath", "did you mean --micro-batch?"),
    ("--quux", "unknown option --quux; --help lists them"), ("--lorra", "--help lists them"),
    ("--" + "x" * 500, "characters more"),
])
def test_an_unknown_option_is_answered(flag: str, answer: str) -> None:
    line = fault(flag, "2")
    assert answer in line and len(line) < 300


def test_the_same_words_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-4\n")
    assert "which is --lr here" in fault("--config", str(tmp_path / "run.yaml"))


def options(text: str) -> set[str]:
    return set(re.findall(r"--([a-z][a-z0-9-]+)", text))


def check_table(table: Table, ours: set[str]) -> None:
    """Every word is foreign, and what it is called here exists; a flag of another tool of ours is named with it."""
    assert not {word for word in table if word in ours} - {"world-size"}
    for word, (flag, why) in table.items():
        assert flag or why, word
        named = options(flag)
        if "tools/" not in why and "torchrun" not in why:
            named |= options(why)
        ours_negated = {f"no-{name}" for name in ours}
        assert named <= ours | ours_negated | {"seq-len"}, (word, flag, why)


def test_every_word_of_training_leads_to_a_flag_that_is_there() -> None:
    ours = options(describe()) | {"world-size", "dry-run", "check", "resume"}
    for table in RUN.values():
        check_table(table, ours)
    assert len({word for table in RUN.values() for word in table}) >= 250


def test_tables_do_not_contradict_each_other() -> None:
    seen: dict[str, str] = {}
    for table in RUN.values():
        for word, (flag, why) in table.items():
            assert seen.setdefault(word, flag or why) == (flag or why), word


@pytest.mark.parametrize("program", TOOLS)
def test_every_word_of_a_tool_leads_to_a_flag_that_it_has(program: str, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    ours = options(help_of(program, monkeypatch, capsys))
    for table in TOOLS[program].values():
        check_table(table, ours)


def help_of(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the program's own --help prints."""
    module = generate if program == "engine.generate" else import_module(f"tools.{program.removesuffix('.py')}")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("argv", "answer"), [
    (["--max-new-tokens", "5"], "unknown option --max-new-tokens, which is --max-tokens here"),
    (["--max-tokes", "5"], "did you mean --max-tokens?"), (["--num-beams=4"], "beam search is not there yet"),
    (["--loa", "x"], "did you mean --load?"), (["extra"], "the following arguments are required: --load"),
    (["--load", "x", "--prompt", "y", "extra"], "unexpected argument 'extra'"),
    (["--load", "x"], "the following arguments are required: --prompt"),
    (["--load", "x", "--prompt"], "expected one argument"), (["--load", "", "--prompt", "x"], "--load is empty"),
    (["--load", "x", "--prompt", "y", "--max-tokens", "9" * 500], "is not a whole number from"),
    (["--load", "x", "--prompt", "y", "--top-p", "half"], "'half' is not a number"),
    (["--load", "x", "--prompt", "y", "--device", "gpu"], "--device 'gpu' is not known; use auto, cpu, cuda"),
])
def test_generation_answers_too(argv: list[str], answer: str) -> None:
    with pytest.raises(UserError) as caught:
        generate.parse(argv)
    assert answer in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(("tool", "flag", "answer"), [
    ("train_tokenizer.py", "--vocab-file", "which is --output here (the folder that the new vocabulary is written to)"),
    ("train_tokenizer.py", "--output-prefix", "which is --output here (a folder)"),
    ("train_tokenizer.py", "--tokenizer", "a vocabulary is made new"),
    ("preprocess_data.py", "--vocab-file", "which is --tokenizer here"),
    ("preprocess_data.py", "--append-bos", "a document begins with its text"),
])
def test_a_tool_answers_to_files_of_vocabularies(tool: str, flag: str, answer: str) -> None:
    command = Command(tool, "")
    for ours in ("--vocab-size", "--append-eod", "--output", "--tokenizer-x"):
        command.add_argument(ours)
    with pytest.raises(UserError, match=re.escape(answer)):
        command.read([flag, "x"])


def test_a_prompt_that_looks_like_a_flag_is_a_prompt() -> None:
    assert generate.parse(["--load", "x", "--prompt=--lora"]).prompt == "--lora"
    assert generate.parse(["--load", "x", "--prompt", "--what is this?"]).prompt == "--what is this?"
    assert generate.parse(["--load", "x", "--prompt", ""]).prompt == "", "an empty prompt begins a document"


@pytest.mark.parametrize(("program", "argv", "word"), [
    ("convert_ckpt.py", ["--load=", "--save", "x"], "--load"),  # the path "" would be the folder one is in
    ("convert_ckpt.py", ["--load", "x", "--save", ""], "--save"),
    ("merge_datasets.py", ["--input", "x", "", "--output-prefix", "y"], "--input"),
    ("preprocess_data.py", ["--input", "", "--tokenizer", "x", "--output-prefix", "y"], "--input"),
    ("train_tokenizer.py", ["--input", "x", "--output", "y", "--vocab-size", ""], "--vocab-size"),
    ("inspect_data.py", [""], "P"),
])
def test_an_empty_value_is_refused_before_it_means_anything(program: str, argv: list[str], word: str,
                                                            tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(f"tools.{program.removesuffix('.py')}")
    with pytest.raises(UserError, match=f"^{word} is empty; give a value"):
        module.main(argv)


def test_no_short_form_stands_for_a_flag() -> None:
    command = Command("convert_ckpt.py", "")
    command.add_argument("--verify", action="store_true")
    with pytest.raises(UserError, match="unknown option --verif; did you mean --verify"):
        command.read(["--verif"])
