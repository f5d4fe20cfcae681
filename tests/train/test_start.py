"""What a run starts from: an older step, changed flags, weights that are no numbers, a folder that disappears."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import pretrain
from engine.checkpoint import Entry, alone, load_weights, open_checkpoint, save_checkpoint
from engine.checkpoint.folders import go_back, later_steps, step_folders
from engine.config import Layout
from engine.errors import UserError
from engine.mesh import build_mesh
from engine.parallel.sharding import Piece, split_rows
from engine.train.agree import agreed
from engine.train.job import prepare
from engine.train.lock import RunLock
from engine.train.place import Place
from engine.train.request import EntryPoint, read_request
from engine.train.start import start_notes

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # for want of a file descriptor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    return runs.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def whole(folder: Path, data: list[str]) -> Path:
    """A run of six steps with three checkpoints."""
    done = runs.pretrain(*runs.MODEL, "--steps", "6", "--save-every", "2", *data, "--out", folder / "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def notes(run: Path, *flags: str) -> list[str]:
    """What a resumed run says of its start."""
    entry = EntryPoint("engine.pretrain", {}, pretrain.check_data)
    request = read_request(entry, ["--out", str(run), "--resume", *flags])
    job = prepare(request, Place(0, 1, 0, 1))
    return start_notes(job.start, job.config)


@pytest.mark.parametrize("flags", [["--resume"], ["--resume-from", "2"]])
@pytest.mark.slow
def test_going_back_is_said_sets_later_steps_aside_and_is_bit_equal(copy: Path, whole: Path, flags: list[str]) -> None:
    if flags == ["--resume"]:
        (copy / "checkpoints" / "latest").write_text("step-00000002\n")
    done = runs.pretrain("--out", copy, *flags)
    assert done.returncode == 0, done.stderr
    assert "going back to step 2: set aside, with .old added to the name: step-00000004, step-00000006\n" in done.stdout
    assert done.stdout.index("going back") < done.stdout.index("step 6/6"), "before the first step"
    for name in ("step-00000004", "step-00000006"):
        old = open_checkpoint(copy / "checkpoints" / f"{name}.old")
        assert old.step == int(name[5:]), "what is set aside can still be loaded"
    runs.assert_same_run(copy, whole)
    assert "resume_from: null" in (copy / "config.yaml").read_text()


def test_a_step_that_is_not_there_is_refused_and_nothing_moves(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(copy)
    for step in ("3", "-1"):
        assert pretrain.main(["--out", str(copy), "--resume-from", step]) == runs.BAD_INPUT
        assert capsys.readouterr().err == (f"error: --resume-from {step}: {copy} has no checkpoint of that step; it "
                                           "has those of 2, 4, 6\n")
    assert pretrain.main(["--resume-from", "3"]) == runs.BAD_INPUT
    assert "give its folder" in capsys.readouterr().err
    assert names(copy) == before


def test_going_back_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(3):
        for step in (10, 20):
            (tmp_path / f"step-{step:08d}").mkdir(exist_ok=True)
            (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{}")
        (tmp_path / "step-00000030").mkdir()  # no manifest: it would be in the way as much
        go_back(tmp_path, 10)
        assert (tmp_path / "latest").read_text() == "step-00000010\n" and later_steps(tmp_path, 10) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step-00000010", *(f"step-000000{step}.old{n}" for step in (20, 30) for n in ("", 2, 3))]
    assert list(step_folders(tmp_path)) == [10]


@pytest.mark.slow
def test_a_step_folder_in_the_way_of_a_new_run_is_set_aside(tmp_path: Path, data: list[str]) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    done = runs.pretrain(*runs.MODEL, "--steps", "2", *data, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "run") == ["latest", "step-00000002", "step-00000002.old"]


def test_a_changed_learning_rate_says_old_and_new(copy: Path) -> None:
    assert notes(copy) == []
    assert notes(copy, "--steps", "6", "--log-every", "5") == ["changed since the checkpoint: --log-every 10 -> 5"]
    said = notes(copy, "--steps", "12")
    assert said[0] == "changed since the checkpoint: --steps 6 -> 12"
    low, high = (0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (6 - 3) / (steps - 3))) for steps in (6, 12))
    assert said[1] == (
        f"the learning-rate schedule has changed: at step 7 the rate is {high:.4g}, and was to be {low:.4g}; --lr 0.01 "
        "--warmup 3 --decay cosine to 0.001 at --steps 12, and was --lr 0.01 --warmup 3 --decay cosine to 0.001 at "
        "--steps 6")
    assert "at step 7 the rate is 0.02, and was to be 0.001; --lr 0.02" in notes(
        copy, "--lr", "0.02", "--steps", "7", "--decay", "constant")[1]


def entries(values: torch.Tensor) -> list[Entry]:
    """One tensor in two slices."""
    members = [split_rows("a.weight", tuple(values.shape), part, 2) for part in range(2)]
    return [Entry("model", Piece(member, (0, 2), member.start, member.extent), part)
            for member, part in zip(members, values.chunk(2), strict=True)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    values = torch.zeros(4, 3)
    values[3, 1] = bad
    save_checkpoint(tmp_path, 1, entries(values), rank=0, world=1, agree=alone,
                    meta={"samples": 0, "config": {}, "world": {}}, assets={})
    source = open_checkpoint(tmp_path / "step-00000001").source()
    load_weights(source, entries(torch.zeros(4, 3))[:1], {"a.weight": (4, 3)})  # a rank that holds the sound half
    with pytest.raises(UserError, match="step-00000001 holds NaN, infinity, .* in a.weight; "):
        load_weights(source, entries(torch.zeros(4, 3)), {"a.weight": (4, 3)})


def test_a_value_beyond_the_runs_format_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, entries(torch.full((4, 3), 1e300, dtype=torch.float64)), rank=0, world=1,
                    agree=alone, meta={"samples": 0, "config": {}, "world": {}}, assets={})
    source = open_checkpoint(tmp_path / "step-00000001").source()
    with pytest.raises(UserError, match="beyond the number format of this run in a.weight"):
        load_weights(source, entries(torch.zeros(4, 3)), {"a.weight": (4, 3)})


def fails_on(rank: int, world: int, victims: list[int]) -> str:
    """On a rank: what it raises when some ranks fail."""
    from datetime import timedelta

    def work() -> str:
        if rank in victims:
            raise UserError(f"the slice of rank {rank} is damaged: \u00fc")
        return "sound"

    mesh = build_mesh(Layout(tp=world), rank, 4, timedelta(seconds=60))
    try:
        return agreed(work, mesh, torch.device("cpu"))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("victims", "words"), [
    ([], "sound"), ([0], "the slice of rank 0 is damaged: \u00fc"),
    ([1], "rank 1: the slice of rank 1 is damaged: \u00fc"),
    ([1, 3], "rank 1: the slice of rank 1 is damaged: \u00fc")])
def test_all_ranks_raise_what_one_has_found(ranks: Any, victims: list[int], words: str) -> None:
    assert ranks(4, fails_on, victims=victims) == [words] * 4


@pytest.mark.slow
def test_a_nan_in_one_ranks_part_ends_all_with_its_name(whole: Path, data: list[str], tmp_path: Path) -> None:
    """Without an agreement the sound rank would wait for the other one in the first step."""
    loaded = open_checkpoint(whole / "checkpoints" / "step-00000002")
    config = loaded.config
    shape = loaded.tensors["model/lm_head.weight"].shape
    found = []
    for name, tensor in loaded.tensors.items():
        if name.startswith("model/"):
            values = loaded.read(name, (0,) * len(tensor.shape), tensor.shape).clone()
            if name == "model/lm_head.weight":
                values[shape[0] - 1, 0] = float("nan")  # the last row of the vocabulary: tp rank 1's
            member = split_rows(name[6:], tensor.shape, 0, 1)
            found.append(Entry("model", Piece(member, (0, tensor.shape[0]), member.start, member.extent), values))
    save_checkpoint(tmp_path / "load" / "checkpoints", 2, found, rank=0, world=1, agree=alone,
                    meta={"samples": 0, "config": config, "world": {}}, assets={})
    flags = [*runs.MODEL, "--steps", "2", *data, "--tp", "2", "--load", str(tmp_path / "load")]
    run = runs.start_ranks(tmp_path / "out", flags, world=2)
    try:
        assert run.codes() == [runs.BAD_INPUT] * 2, run.said()
    finally:
        run.kill()
    assert "rank 1: " in run.said() and "holds NaN, infinity, " in run.said() and "in lm_head.weight" in run.said()
    assert "Traceback" not in run.said()


def delete(out: Path, away: Path) -> None:
    shutil.rmtree(out)


def replace(out: Path, away: Path) -> None:
    out.rename(away)
    out.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("remove", [delete, replace])
def test_a_run_whose_folder_disappears_saves_and_does_not_say_done(
        tmp_path: Path, data: list[str], remove: Callable[[Path, Path], None]) -> None:
    run = runs.start_ranks(tmp_path / "run", [*runs.MODEL, "--steps", "20000", *data], world=2)
    try:
        run.wait_for_step(2)
        remove(run.out, tmp_path / "away")
        assert run.codes() == [runs.BAD_INPUT] * 2, run.said()
    finally:
        run.kill()
    said = run.said()
    assert "done at step" not in said and "Traceback" not in said
    assert f"error: --out {run.out} was deleted or replaced under the run, which was seen at step " in said
    [step] = step_folders(run.out / "checkpoints")
    assert f"the checkpoint of step {step} stands there anew" in said
    again = runs.pretrain("--out", run.out, "--resume", "--stop-after", str(step + 1))
    assert again.returncode == 0, again.stderr


def test_a_lock_knows_its_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert lock.in_place()
        (tmp_path / "run").rename(tmp_path / "away")
        assert not lock.in_place()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").touch()
        assert not lock.in_place()
        shutil.copy(tmp_path / "away" / ".lock", tmp_path / "run" / ".lock")
        assert lock.in_place(), "another number for the same file, as some network file systems give"
