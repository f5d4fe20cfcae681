"""Faults injected for real: what is killed, stopped or crashes ends every rank in time, is named, and resumes."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs
from runs import TP2_PP2, Run

from engine.checkpoint import latest_step

IN_TIME = 15.0
STEPS = ["--steps", "30", "--save-every", "3", "--keep", "2"]
ENDLESS = ["--steps", "100000", "--keep", "1"]
PROGRAM = '''
"""engine.pretrain, with a fault in one rank's data at its fifth step."""
import dataclasses, os, sys, time
from engine import pretrain
from engine.train.entry import enter
from engine.train.request import EntryPoint

class Faulty:
    def __init__(self, batches):
        self.batches = batches
    def step(self, step):
        if step == 4 and os.environ["FAULT"] == "raise":
            raise ValueError("the disk has gone")
        if step == 4 and os.environ["FAULT"] == "hang":
            time.sleep(1000)
        return self.batches.step(step)

def make_feed(job, mesh, origin):
    feed = pretrain.make_feed(job, mesh, origin)
    return dataclasses.replace(feed, batches=Faulty(feed.batches)) if mesh.rank == 2 else feed

sys.exit(enter(EntryPoint("faulty", {}, pretrain.check_data), sys.argv[1:], (), (), make_feed))
'''
Start = Callable[[Callable[..., Run], str, Sequence[str]], Run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    return runs.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def whole(folder: Path, data: list[str]) -> Path:
    """The run that nothing happened to."""
    run = runs.start_ranks(folder / "whole", [*runs.MODEL, *TP2_PP2, *STEPS, *data])
    assert run.codes() == [0] * 4, run.said()
    return run.out


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run that is ended with the test."""
    started: list[Run] = []

    def begin(how: Callable[..., Run], name: str, flags: Sequence[str], **more: object) -> Run:
        started.append(how(folder / name, flags, **more))
        return started[-1]

    yield begin
    for run in started:
        run.kill()


def all_gone(run: Run, pids: Sequence[int], seconds: float = IN_TIME) -> None:
    """Asserts that the ranks and their launcher end within some seconds."""
    began = time.monotonic()
    ended = runs.until(lambda: run.all_ended() and not any(map(runs.alive, pids)), seconds)
    left = [rank for rank, pid in enumerate(pids) if runs.alive(pid)]
    assert ended, f"ranks {left} live {time.monotonic() - began:.0f} s later:\n{run.said()}"


@pytest.mark.slow
def test_a_killed_rank_ends_all_is_named_and_the_run_resumes_bit_equal(
        start: Callable[..., Run], whole: Path, data: list[str]) -> None:
    victim, step = random.randrange(4), random.randrange(4, 10)
    flags = [*runs.MODEL, *TP2_PP2, *STEPS, *data]
    run = start(runs.torchrun, "killed", flags)
    run.wait_for_step(step)
    pids = run.pids()
    assert len(pids) == 4
    os.kill(pids[victim], signal.SIGKILL)
    all_gone(run, pids)
    assert f"rank {victim} (process {pids[victim]}) has died; this rank ends without saving" in run.said(), run.said()
    assert run.codes() == [1]
    again = start(runs.start_ranks, "killed", [*flags, "--resume"])
    assert again.codes() == [0] * 4, again.said()
    runs.assert_same_run(run.out, whole)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_run_resumes_bit_equal(
        start: Callable[..., Run], whole: Path, data: list[str]) -> None:
    flags = [*runs.MODEL, *TP2_PP2, *STEPS, *data]
    run = start(runs.torchrun, "stopped", flags)
    run.wait_for_step(4)
    pids = run.pids()
    assert run.launcher is not None
    run.launcher.terminate()
    all_gone(run, pids)
    last = latest_step(run.out)
    assert last is not None and f"stopped by SIGTERM at step {int(last.name[5:])} of 30" in run.said(), run.said()
    assert int(last.name[5:]) == run.metrics()[-1]["step"], "the step at which the signal came is saved"
    again = start(runs.start_ranks, "stopped", ["--resume"])
    assert again.codes() == [0] * 4, again.said()
    runs.assert_same_run(run.out, whole)


@pytest.mark.slow
def test_ranks_agree_on_a_signal_that_one_of_them_got(start: Callable[..., Run], data: list[str]) -> None:
    run = start(runs.start_ranks, "agreed", [*runs.MODEL, *TP2_PP2, *ENDLESS, *data])
    run.wait_for_step(2)
    run.ranks[2].terminate()
    all_gone(run, run.pids())
    assert run.codes() == [0] * 4, run.said()
    last = latest_step(run.out)
    assert last is not None and int(last.name[5:]) == run.metrics()[-1]["step"]


@pytest.mark.slow
def test_the_death_of_rank_0_ends_all(start: Callable[..., Run], data: list[str]) -> None:
    run = start(runs.start_ranks, "headless", [*runs.MODEL, *TP2_PP2, *ENDLESS, *data])
    run.wait_for_step(1)
    run.ranks[0].kill()
    all_gone(run, run.pids())
    assert run.codes()[1:] == [1] * 3
    assert "the store of rank 0 is gone" in run.said() or "rank 0 (process" in run.said()


@pytest.mark.slow
def test_a_crash_ends_all_and_names_the_first(start: Callable[..., Run], folder: Path, data: list[str]) -> None:
    (folder / "faulty.py").write_text(PROGRAM)
    run = start(runs.start_ranks, "crashed", [*runs.MODEL, *TP2_PP2, *ENDLESS, *data],
                program=[str(folder / "faulty.py")], env={"FAULT": "raise"})
    run.wait_for_step(3)
    all_gone(run, run.pids())
    assert run.codes() == [1] * 4
    assert "rank 2 (pp2 dp1 tp2 · rank 2 = pp1 tp0) failed: ValueError: the disk has gone; this rank ends" in run.said()
    assert "Traceback" in run.said(), "the crash itself is shown"
    assert latest_step(run.out) is None, "a crash saves nothing"


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_at_the_timeout_and_named(start: Callable[..., Run], data: list[str]) -> None:
    run = start(runs.start_ranks, "asleep", [*runs.MODEL, *TP2_PP2, *ENDLESS, *data, "--timeout", "8"])
    run.wait_for_step(2)
    pids = run.pids()
    os.kill(pids[1], signal.SIGSTOP)
    others = [pid for pid in pids if pid != pids[1]]
    assert runs.until(lambda: not any(map(runs.alive, others)), 8 + IN_TIME), run.said()
    assert "rank 1 does not respond (stopped, or its machine is gone): a collective has timed out" in run.said()
    os.kill(pids[1], signal.SIGCONT)  # awake again, it finds that the run has ended
    all_gone(run, pids)
    assert run.codes() == [1] * 4


@pytest.mark.slow
def test_a_rank_that_never_comes_to_a_collective_ends_all_at_the_timeout(
        start: Callable[..., Run], folder: Path, data: list[str]) -> None:
    (folder / "faulty.py").write_text(PROGRAM)
    run = start(runs.start_ranks, "hung", [*runs.MODEL, *TP2_PP2, *ENDLESS, *data, "--timeout", "8"],
                program=[str(folder / "faulty.py")], env={"FAULT": "hang"})
    run.wait_for_step(3)
    all_gone(run, run.pids(), 8 + IN_TIME)
    assert run.codes() == [1] * 4


def test_a_token_past_the_vocabulary_in_one_ranks_data_ends_all(start: Callable[..., Run], folder: Path) -> None:
    data = runs.write_corpus(folder / "bad", bad=True)
    run = start(runs.start_ranks, "token", [*runs.MODEL, *ENDLESS, *data], world=2)
    pids = run.pids()
    all_gone(run, pids, 60)
    assert run.codes().count(2) >= 1 and 0 not in run.codes(), run.said()
    assert "60000" in run.said() and "vocabulary" in run.said(), run.said()
