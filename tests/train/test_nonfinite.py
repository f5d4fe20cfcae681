"""A step whose loss or gradient norm is not finite moves no weight: the first ends the run, or --skip-nonfinite of them
in a row; what follows a skipped step does not know of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import runs
import toys

from engine import pretrain
from engine.checkpoint import latest_step, open_checkpoint, step_folders
from engine.parallel.executor import Executor
from engine.train.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
POISONED = (2, 4)
"""Steps, from 0, in which one gradient of one rank is infinite."""


def poison(engine: Engine, here: bool) -> Callable[..., torch.Tensor]:
    """The executor's `train`, which spoils the gradients of some steps on one rank."""
    sound = engine.executor.train

    def train(*given: Any) -> torch.Tensor:
        loss = sound(*given)
        if here and engine.step in POISONED:
            grads, span = next((bucket.shard_grads, span) for bucket in engine.optimizer.buckets
                               for piece, span in bucket.shard_pieces() if piece.member.primary)  # copies do not count
            grads[span][0] = torch.inf
        return loss

    return train


def run(rank: int, world: int, flags: str) -> Any:
    """On a rank: six steps; for each the loss, whether it was finite and whether a weight of this rank has moved."""
    engine = toys.make_engine(toys.make_config(flags), rank, world)
    engine.executor.train = poison(engine, here=rank == world - 1)  # type: ignore[method-assign]
    found = []
    for step in range(6):
        before = [values for *_, values in toys.local_weights(engine)]
        batch = toys.make_batch(engine.config, step, engine.mesh.dp, engine.mesh.size("dp"))
        result = engine.train_step(batch)
        moved = any((old != new).any() for old, (*_, new) in zip(before, toys.local_weights(engine), strict=True))
        found.append((result.loss, result.finite, moved))
    return found, engine.optimizer.steps


@pytest.mark.parametrize(("world", "flags"), [(2, "--tp 2"), (2, ""), (4, "--pp 2"), (2, "--pp 2")])
def test_all_ranks_skip_the_step_and_go_on_as_one_process_does(ranks: Any, world: int, flags: str) -> None:
    [(wanted, steps)] = ranks(1, run, flags=toys.MODELS["gpt2"])
    assert [finite for _, finite, _ in wanted] == [step not in POISONED for step in range(6)] and steps == 4
    for found, counted in ranks(world, run, flags=f"{toys.MODELS['gpt2']} {flags}"):
        assert [(finite, moved) for _, finite, moved in found] == [(finite, finite) for _, finite, _ in wanted]
        np.testing.assert_allclose([loss for loss, *_ in found], [loss for loss, *_ in wanted], rtol=1e-10)
        assert counted == 4, "a skipped step does not count in the moments' corrections"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Pretrains in this process; some steps (from 1) have an infinite loss."""
    data = runs.write_corpus(tmp_path / "corpus")
    sound = Executor.train

    def start(out: str, *flags: str, bad: tuple[int, ...] = (), steps: int = 8) -> int:
        calls = iter(range(latest(out) + 1, steps + 1))

        def spoiled(self: Executor, *given: Any) -> torch.Tensor:
            return sound(self, *given) * (torch.inf if next(calls) in bad else 1.0)

        monkeypatch.setattr(Executor, "train", spoiled)
        return pretrain.main([*runs.MODEL, *data, "--steps", str(steps), "--out", str(tmp_path / out), *flags])

    def latest(out: str) -> int:
        folder = latest_step(tmp_path / out)
        return 0 if folder is None else open_checkpoint(folder).step

    return start


def test_skipped_steps_are_counted_and_written_down(train: Callable[..., int], tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert train("out", "--skip-nonfinite", "3", bad=(3, 4, 7)) == 0
    text = (tmp_path / "out" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in
             text.splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4, 7]
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 7]
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped: no weight has moved" in line]
    assert [line.partition("/")[0] for line in said] == ["step 3", "step 4", "step 7"] and said[-1].count("start: 3")
    last = latest_step(tmp_path / "out")
    assert last is not None and open_checkpoint(last).optimizer_steps == 5


def test_a_run_that_is_stopped_beside_a_skipped_step_resumes_bit_equal(train: Callable[..., int],
                                                                       tmp_path: Path) -> None:
    skip = ("--skip-nonfinite", "2")
    assert train("whole", *skip, bad=(3,)) == 0
    assert train("parts", *skip, "--stop-after", "3", bad=(3,)) == 0
    assert train("parts", *skip, "--resume", bad=(3,)) == 0
    runs.assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_no_checkpoint_is_deleted_while_steps_are_skipped(train: Callable[..., int], tmp_path: Path) -> None:
    flags = ("--skip-nonfinite", "3", "--save-every", "1", "--keep", "1")
    assert train("lost", *flags, bad=(3, 4, 5)) == 1
    assert list(step_folders(tmp_path / "lost" / "checkpoints")) == [2, 3, 4], "the last weights that were sound"
    assert train("found", *flags, bad=(3, 4)) == 0
    assert list(step_folders(tmp_path / "found" / "checkpoints")) == [8]


@pytest.mark.parametrize(("flags", "bad", "words"), [
    ((), (3,), "step 3: loss inf, gradient norm "), (("--skip-nonfinite", "1"), (3,), "no weight has moved. Lower"),
    (("--skip-nonfinite", "2"), (2, 4, 5), "step 5: loss inf"),
    (("--skip-nonfinite", "2"), (4, 5), "no weight has moved in 2 steps (--skip-nonfinite 2)")])
def test_so_many_in_a_row_end_the_run(train: Callable[..., int], capsys: pytest.CaptureFixture[str],
                                      flags: tuple[str, ...], bad: tuple[int, ...], words: str) -> None:
    assert train("out", *flags, bad=bad) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
