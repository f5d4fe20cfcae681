"""A run that is refused leaves nothing behind; --check, --dry-run and --epochs say what the run would do."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from engine import finetune, pretrain
from engine.data.indexed import bare_prefix
from engine.errors import UserError
from engine.train.lock import RunLock

sys.path.insert(0, str(Path(__file__).parent))
import runs  # noqa: E402

# The launcher library asks for a file descriptor that captured output does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
ONE_STEP = [*runs.MODEL, "--steps", "1"]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    return runs.write_corpus(tmp_path / "corpus")


def test_a_refused_run_takes_away_its_lock_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError), RunLock(tmp_path / "a" / "b") as lock:
        for name in ("config.yaml", "env.json", "metrics.jsonl"):
            (lock.out / name).touch()
        raise UserError("bad data")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError), RunLock(tmp_path):
        raise UserError("bad data")
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "notes"]


def test_a_run_that_has_made_a_step_or_crashed_keeps_all(tmp_path: Path) -> None:
    for out, error, line in ((tmp_path / "stepped", UserError("full"), "{}\n"), (tmp_path / "crashed", OSError(), "")):
        with pytest.raises(type(error)), RunLock(out):
            (out / "metrics.jsonl").write_text(line)
            raise error
        assert sorted(os.listdir(out)) == [".lock", "metrics.jsonl"]


def test_a_lock_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        os.unlink(tmp_path / ".lock")
        with RunLock(tmp_path):
            assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_bad_ids_in_the_first_step_leave_no_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                       flags: list[str]) -> None:
    bad = runs.write_corpus(tmp_path / "corpus", tokens=100, bad=True)
    before = sorted(os.listdir(tmp_path))
    assert pretrain.main([*ONE_STEP, *bad, "--out", str(tmp_path / "runs" / "one"), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_check_reads_the_data_and_gives_a_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                  data: list[str]) -> None:
    assert pretrain.main([*ONE_STEP, *data, "--out", str(tmp_path / "out"), "--check"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("engine.pretrain: tiny in float32 on c") and said[-1] == "sound; nothing was started"
    assert any("62 samples an epoch" in line for line in said)
    assert any(line.startswith("this machine holds it: the fullest rank needs") for line in said)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_takes_auto_as_the_run_would_and_says_what_stops_it(capsys: pytest.CaptureFixture[str],
                                                                      data: list[str]) -> None:
    import torch

    assert pretrain.main([*runs.MODEL, *data, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert ("bfloat16 on cuda" if torch.cuda.is_available() else "float32 on cpu") in said and "62 samples" in said
    assert pretrain.main([*runs.MODEL, "--data", "nowhere", "--dry-run"]) == 0
    assert "the run itself would stop at its data: no dataset at nowhere.idx" in capsys.readouterr().out
    assert pretrain.main("--model 70b --tp 8 --pp 8 --world-size 64 --dry-run --device cpu".split()) == 0
    assert "this machine does not hold it: training 70b in float32 needs" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert pretrain.main("--model tiny --device cuda --dtype bf16 --dry-run".split()) == 0
        assert "this machine has no GPU that PyTorch sees; each one would need" in capsys.readouterr().out


def test_a_recipe_without_data_says_that_it_takes_the_demo_s(capsys: pytest.CaptureFixture[str],
                                                             data: list[str]) -> None:
    asked = [*runs.MODEL, "--dry-run"]
    assert pretrain.main(asked, demo=data) == 0
    assert f"no --data: taking the demo's, {data[1]}" in capsys.readouterr().out
    assert pretrain.main([*asked, *data], demo=["--data", "demo"]) == 0
    assert "demo" not in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "global_batch"), [("1", 4), ("0.1", 4), ("2.5", 8), ("3", 62)])
def test_epochs_are_so_many_steps_that_each_sample_is_seen(capsys: pytest.CaptureFixture[str], data: list[str],
                                                           epochs: str, global_batch: int) -> None:
    size = ["--global-batch", str(global_batch), "--steps", "7"]
    recipe = [*runs.MODEL, *size]  # whose --steps give way
    assert pretrain.main(["--epochs", epochs, *data, "--check"], recipe=recipe) == 0
    steps = math.ceil(round(62 * float(epochs), 6) / global_batch)
    assert f"so {steps:,} steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_epochs_reads_back_as_a_run_of_steps(tmp_path: Path, data: list[str]) -> None:
    done = runs.pretrain(*runs.MODEL, *data, "--epochs", "0.2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "steps: 4\n" in config and "epochs: 0.0\n" in config
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "out" / "env.json").read_text())["command"]


def test_a_corpus_may_be_named_by_either_of_its_files(capsys: pytest.CaptureFixture[str], data: list[str]) -> None:
    for suffix in (".bin", ".idx"):
        for spec in (f"{data[1]}{suffix}", f"{data[1]}{suffix}:1.0"):
            assert pretrain.main([*ONE_STEP, "--data", spec, "--check"]) == 0
    assert bare_prefix("nowhere.bin") == "nowhere.bin"
    capsys.readouterr()
    assert pretrain.main([*ONE_STEP, "--data", f"{data[1]}.bin:1,{data[1]}:1", "--check"]) == 2
    assert "twice" in capsys.readouterr().err


def test_a_dry_run_of_tuning_plans_for_a_model_that_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Without one it said that this machine holds it, of a preset that nobody had asked for."""
    assert finetune.main("--dry-run --device cpu".split()) == 2
    assert "needs a model to plan for" in capsys.readouterr().err
    assert finetune.main("--dry-run --device cpu --model 125m --seq-len 64".split()) == 0
    assert "125m" in capsys.readouterr().out


def test_a_recipe_whose_model_is_not_there_says_what_makes_it(capsys: pytest.CaptureFixture[str],
                                                              tmp_path: Path) -> None:
    recipe = ["--load", str(tmp_path / "demo" / "runs")]
    for flags in ([], ["--check"], ["--dry-run"]):
        assert finetune.main(flags, recipe=recipe) == runs.BAD_INPUT
        line = capsys.readouterr().err
        assert f"{recipe[1]}, the model that this recipe tunes, is not there: `make demo` makes it" in line
    assert finetune.main(recipe) == runs.BAD_INPUT
    assert "make demo" not in capsys.readouterr().err, "the caller's own folder is no demo"
