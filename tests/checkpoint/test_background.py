"""A checkpoint that is written beside training is the state of its step, and every death leaves a whole one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_save_load import ASSETS, META, TINY, Rank, Talk, build

from engine.checkpoint import background, latest_step, open_checkpoint, tensorfile
from engine.checkpoint import save as saving
from engine.checkpoint.background import BackgroundSave, Saved
from engine.errors import UserError
from engine.model.shapes import logical_shapes

CPU = torch.device("cpu")
ONE_LAYER = replace(TINY, layers=1)


class Training:
    """A rank that changes its state in every step, and saves after those of `saves`."""

    def __init__(self, root: Path, rank: Rank, number: int, talk: Talk) -> None:
        self.rank, self.talk, self.number = rank, talk, number
        self.world = talk.barrier.parties
        self.told: list[Saved] = []
        self.step = 0
        self.kept: dict[int, list[torch.Tensor]] = {}
        self.saver = BackgroundSave(root, rank=number, world=self.world, agree=partial(talk.agree, number), device=CPU,
                                    told=self.told.append)

    def run(self, steps: int, saves: tuple[int, ...]) -> None:
        for _ in range(steps):
            self.saver.before_update()
            for entry in self.rank.entries:
                entry.tensor.add_(1)
            self.step += 1
            self.saver.heard(*self.talk.agree(self.number, self.saver.numbers()))
            if self.step in saves:
                self.kept[self.step] = [entry.tensor.clone() for entry in self.rank.entries]
                self.saver.save(self.step, self.rank.entries, meta=META, assets=ASSETS)
        self.saver.finish()


def trained(root: Path, ranks: list[Rank], steps: int,
            saves: tuple[int, ...]) -> tuple[list[Training], list[Exception | None]]:
    """Trains in one thread a rank; returns them, and what each has raised."""
    talk = Talk(len(ranks))
    found = [Training(root, rank, number, talk) for number, rank in enumerate(ranks)]
    raised: list[Exception | None] = [None] * len(ranks)

    def run(number: int) -> None:
        try:
            found[number].run(steps, saves)
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, raised


def slow(function: Callable[..., object], seconds: float) -> Callable[..., object]:
    def slowed(*given: object, **named: object) -> object:
        time.sleep(seconds)
        return function(*given, **named)

    return slowed


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("what", ["copy", "write", "nothing"])
def test_a_checkpoint_holds_the_state_of_its_step_though_training_went_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: tuple[int, int, int], what: str) -> None:
    if what == "copy":
        monkeypatch.setattr(background, "_copied", slow(background._copied, 0.001))
    if what == "write":
        monkeypatch.setattr(saving.SaveWork, "write", slow(saving.SaveWork.write, 0.1))
    ranks = build(TINY, layout, torch.float32)
    found, raised = trained(tmp_path, ranks, steps=7, saves=(2, 3, 6))
    assert not any(raised), raised
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step-00000002", "step-00000003", "step-00000006"]
    for step in (2, 3, 6):
        checkpoint = open_checkpoint(tmp_path / f"step-{step:08d}")
        for training in found:
            checkpoint.load(training.rank.entries, expected=logical_shapes(TINY))
            for entry, kept in zip(training.rank.entries, training.kept[step], strict=True):
                assert torch.equal(entry.tensor, kept), (step, entry.name)
    for training in found:
        assert [saved.folder.name for saved in training.told] == ["step-00000002", "step-00000003", "step-00000006"]
        assert all(saved.waited >= 0 and saved.seconds > 0 for saved in training.told)


@pytest.mark.parametrize(("call", "rank"), [("mkdir", 0), ("write", 0), ("write", 1), ("announce", 0)])
def test_what_fails_on_one_rank_ends_all_at_the_same_step_and_leaves_the_step_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, rank: int) -> None:
    module, name = (Path, call) if call == "mkdir" else (saving, "write_tensors" if call == "write" else call)
    sound = getattr(module, name)

    def failing(path: Path, *given: object, **named: object) -> object:
        if "step-00000002" in f"{path}{given}" and (call != "write" or f"rank-{rank:05d}" in path.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return sound(path, *given, **named)

    monkeypatch.setattr(module, name, failing)
    found, raised = trained(tmp_path, build(TINY, (1, 1, 2)), steps=12, saves=(1, 2, 6))
    assert all(isinstance(error, UserError) and "No space left" in str(error) for error in raised), raised
    assert len({training.step for training in found}) == 1 and 2 <= found[0].step < 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert open_checkpoint(tmp_path / "step-00000001").step == 1


def test_a_save_that_is_given_up_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()

    def values(block: tensorfile.Block) -> memoryview:
        reached.set()
        time.sleep(0.02)
        return sound(block)

    sound = tensorfile._values
    monkeypatch.setattr(tensorfile, "_values", values)
    [rank] = build(TINY, (1, 1, 1))
    training = Training(tmp_path, rank, 0, Talk(1))
    training.run(1, ())
    training.saver.save(1, rank.entries, meta=META, assets=ASSETS)
    assert reached.wait(10)
    training.saver.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_memory_for_the_copy_is_told_of_save_wait(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    [rank] = build(ONE_LAYER, (1, 1, 1))
    training = Training(tmp_path, rank, 0, Talk(1))
    sound = torch.empty

    def empty(size: int, **named: object) -> torch.Tensor:
        if size:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return sound(size, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(background.torch, "empty", empty)
    with pytest.raises(UserError, match=r"has no \d+ MB of main memory for a copy .*; use --save-wait"):
        training.run(3, (1,))
    assert not list(tmp_path.iterdir())


# Deaths ---------------------------------------------------------------------------------------------------------------

CALLS = ("fsync", "rename", "replace", "rmdir", "write")


def dying_run(root: str, call: str, nth: int) -> None:
    """In a process of its own: saves beside training, and is killed at the nth call."""
    calls = iter(range(1, 1 << 30))
    module, name = (tensorfile, "_write") if call == "write" else (os, call)
    sound = getattr(module, name)

    def deadly(*given: object, **named: object) -> object:
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return sound(*given, **named)

    setattr(module, name, deadly)
    [rank] = build(ONE_LAYER, (1, 1, 1))
    training = Training(Path(root), rank, 0, Talk(1))
    for step in (1, 2):
        training.saver.before_update()
        for entry in rank.entries:
            entry.tensor.fill_(step)
        training.saver.save(step, rank.entries, meta=META, assets=ASSETS, keep=1)
    training.saver.finish()


def killed_at(root: Path, call: str, nth: int) -> bool:
    """Whether a run was killed at its nth call."""
    process = multiprocessing.get_context("forkserver").Process(target=dying_run, args=(str(root), call, nth))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("call", [
    pytest.param(call, marks=pytest.mark.soak if call in ("fsync", "write") else pytest.mark.slow) for call in CALLS])
def test_a_kill_at_any_call_of_the_thread_leaves_one_whole_checkpoint(tmp_path: Path, call: str) -> None:
    seen = set()
    for nth in range(1, 2000):
        root = tmp_path / f"{call}-{nth}" / "checkpoints"
        killed = killed_at(root, call, nth)
        folder = latest_step(root.parent) if root.is_dir() else None
        step = 0
        if folder is not None:
            checkpoint = open_checkpoint(folder)
            step = checkpoint.step
            [rank] = build(ONE_LAYER, (1, 1, 1), seed=None)
            checkpoint.load(rank.entries, expected=logical_shapes(ONE_LAYER))
            assert all((entry.tensor == step).all() for entry in rank.entries), (call, nth)
        seen.add(step)
        [rank] = build(ONE_LAYER, (1, 1, 1))
        training = Training(root, rank, 0, Talk(1))
        training.step = step
        training.run(1, (step + 1,))  # whatever the death has left, the run goes on
        assert latest_step(root.parent) == root / f"step-{step + 1:08d}"
        if not killed:
            break
    assert not killed and nth > 2 and max(seen) == 2, seen
