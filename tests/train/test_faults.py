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
from engine.train.lock import RunLock

IN_TIME = 40.0
STEPS = ["--steps", "30", "--save-every", "3", "--keep", "2"]
ENDLESS = ["--steps", "100000", "--keep", "1"]
PROGRAM = '''
"""engine.pretrain, with a fault in one rank."""
import dataclasses, os, sys, time
from engine import pretrain
from engine.checkpoint import save
from engine.comm.local import shared
from engine.parallel.executor import _Run
from engine.train.entry import enter
from engine.train.request import EntryPoint

FAULT, MINE = os.environ["FAULT"], os.environ["RANK"] == os.environ["AT"]

class Faulty:
    def __init__(self, batches):
        self.batches = batches
    def step(self, step):
        if step == 4 and FAULT == "raise":
            raise ValueError("the disk has gone")
        if step == 4 and FAULT == "data":
            time.sleep(1000)
        return self.batches.step(step)

def sleepy(function, call, seconds=1000):
    calls = iter(range(1 << 40))
    def sleeps(*arguments):
        result = function(*arguments)
        if next(calls) == call:
            time.sleep(seconds)
        return result
    return sleeps

def mute(self, comm, deadline, wait=shared.Host._await):
    try:
        wait(self, comm, deadline)
    except shared.PeerLost:
        time.sleep(1000)

def make_feed(job, mesh, origin):
    if MINE and FAULT == "start":
        time.sleep(1000)
    feed = pretrain.make_feed(job, mesh, origin)
    return dataclasses.replace(feed, batches=Faulty(feed.batches)) if MINE else feed

if FAULT == "mute":  # a transport that never raises
    shared.Host._await = mute
if MINE and FAULT == "model":
    _Run._forward = sleepy(_Run._forward, 9)
if MINE and FAULT == "save":
    save.SaveWork.write = sleepy(save.SaveWork.write, 0)
if MINE and FAULT == "slow save":
    save.SaveWork.write = sleepy(save.SaveWork.write, 0, 12)
sys.exit(enter(EntryPoint("faulty", {}, pretrain.check_data), sys.argv[1:], (), (), make_feed))
'''
PAIR = [*runs.MODEL, "--pp", "2"]
FORMS = [runs.start_ranks, runs.torchrun]
"""Without a launcher that ends the others (mpirun, srun), and with torchrun's agent."""
Start = Callable[[Callable[..., Run], str, Sequence[str]], Run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faulty(folder: Path) -> list[str]:
    """The program with a fault, to be started in place of engine.pretrain."""
    (folder / "faulty.py").write_text(PROGRAM)
    return [str(folder / "faulty.py")]


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
    assert "rank 0 is gone, and its store with it" in run.said() or "rank 0 (process" in run.said()


@pytest.mark.slow
def test_a_crash_ends_all_and_names_the_first(start: Callable[..., Run], data: list[str], faulty: list[str]) -> None:
    run = start(runs.start_ranks, "crashed", [*runs.MODEL, *TP2_PP2, *ENDLESS, *data], program=faulty,
                env={"FAULT": "raise", "AT": "2"})
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
    assert run.said().count(f"rank 1 (process {pids[1]} on") == 3, run.said()
    assert run.said().count("does not respond (stopped, or its machine is gone); it was last seen in") == 3, run.said()
    os.kill(pids[1], signal.SIGCONT)  # awake again, it finds that the run has ended
    all_gone(run, pids)
    assert run.codes() == [1] * 4


@pytest.mark.slow
def test_rank_0_frozen_with_its_store_ends_the_others(start: Callable[..., Run], data: list[str]) -> None:
    """No launcher is there, and no call to the store returns."""
    run = start(runs.start_ranks, "frozen", [*PAIR, *ENDLESS, *data, "--timeout", "6"], world=2)
    run.wait_for_step(2)
    head, other = run.pids()
    os.kill(head, signal.SIGSTOP)
    assert runs.until(lambda: run.ranks[1].poll() is not None, 6 + IN_TIME), run.said()
    assert "rank 0 does not respond (stopped, or its machine is gone): its store has been silent for" in run.said()
    assert run.ranks[1].poll() == 1
    os.kill(head, signal.SIGCONT)
    all_gone(run, [head, other])
    assert "rank 0 was stopped for" in run.said() and "Traceback" not in run.said(), run.said()


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_data_is_named_by_all_and_shows_where(
        start: Callable[..., Run], data: list[str], faulty: list[str]) -> None:
    run = start(runs.start_ranks, "data", [*PAIR, *ENDLESS, *data, "--timeout", "6"], world=2, program=faulty,
                env={"FAULT": "data", "AT": "1"})
    assert_hang(run, 1, "data at step 5")
    assert run.codes() == [1] * 2
    assert len(ends(run)) == 2 and "Traceback" not in run.said(), run.said()
    assert 'faulty.py", line' in run.said().partition("in step")[0], "its stack is shown"


def assert_hang(run: Run, rank: int, where: str) -> None:
    """Asserts that all ranks end by themselves and name the rank that hangs."""
    all_gone(run, run.pids(), 240)
    hangs = [line for line in ends(run) if f"rank {rank} (process" in line and f"hangs in {where}" in line]
    assert hangs and hangs == ends(run), run.said()


def ends(run: Run) -> list[str]:
    """The lines in which ranks say why they end. A launcher may end some before they have."""
    return [line for line in run.said().splitlines() if "this rank ends without saving" in line]


@pytest.mark.soak
@pytest.mark.parametrize(("form", "fault", "more", "where"), [
    (runs.torchrun, "data", [], "data at step 5"), (runs.start_ranks, "model", [], "forward at step "),
    (runs.start_ranks, "save", ["--save-wait"], "save at step 3"),
    (runs.torchrun, "save", [], "save at step 6")])  # the next save waits for one that is written beside training
def test_a_rank_that_hangs_anywhere_is_named(start: Callable[..., Run], data: list[str], faulty: list[str],
                                             form: Callable[..., Run], fault: str, more: list[str], where: str) -> None:
    flags = [*PAIR, *ENDLESS, "--save-every", "3", *data, "--timeout", "10", "--save-timeout", "20", *more]
    run = start(form, f"hangs-{fault}-{form.__name__}", flags, world=2, program=faulty, env={"FAULT": fault, "AT": "1"})
    assert_hang(run, 1, where)


@pytest.mark.soak
def test_a_killed_rank_ends_all_though_their_transport_never_raises(
        start: Callable[..., Run], data: list[str], faulty: list[str]) -> None:
    run = start(runs.start_ranks, "mute", [*runs.MODEL, *ENDLESS, *data], world=2, program=faulty,
                env={"FAULT": "mute", "AT": "1"})
    run.wait_for_step(2)
    pids = run.pids()
    run.ranks[1].kill()
    all_gone(run, pids)
    assert f"rank 1 (process {pids[1]}) has died" in run.said(), run.said()


@pytest.mark.soak
def test_a_save_slower_than_the_timeout_is_waited_for(
        start: Callable[..., Run], data: list[str], faulty: list[str]) -> None:
    run = start(runs.start_ranks, "slow", [*PAIR, "--steps", "3", *data, "--timeout", "6"], world=2, program=faulty,
                env={"FAULT": "slow save", "AT": "1"})
    assert run.codes() == [0, 0], run.said()
    assert latest_step(run.out) is not None


@pytest.mark.slow
def test_a_second_run_in_one_folder_ends_all_its_ranks_before_they_meet(
        start: Callable[..., Run], folder: Path, data: list[str]) -> None:
    with RunLock(folder / "taken"):
        run = start(runs.start_ranks, "taken", [*PAIR, *ENDLESS, *data], world=2)
        all_gone(run, run.pids(), 200)
    assert run.codes() == [2, 2], run.said()
    assert f"another run is writing {folder / 'taken'}" in run.said() and "Traceback" not in run.said(), run.said()


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
def test_a_rank_killed_before_the_first_step_ends_all(
        start: Callable[..., Run], data: list[str], faulty: list[str], form: Callable[..., Run]) -> None:
    run = start(form, f"early-{form.__name__}", [*PAIR, *ENDLESS, *data], world=2, program=faulty,
                env={"FAULT": "start", "AT": "1"})
    pids = begun(run)
    os.kill(pids[1], signal.SIGKILL)
    all_gone(run, pids)
    assert f"rank 1 (process {pids[1]}) has died" in run.said() or form is runs.torchrun, run.said()


@pytest.mark.soak
def test_a_launcher_killed_before_the_first_step_ends_all(
        start: Callable[..., Run], data: list[str], faulty: list[str]) -> None:
    run = start(runs.torchrun, "orphans", [*PAIR, *ENDLESS, *data], world=2, program=faulty,
                env={"FAULT": "start", "AT": "1"})
    pids = begun(run)
    assert run.launcher is not None
    run.launcher.kill()
    all_gone(run, pids)
    assert "torchrun's agent is gone, and its store with it; this rank ends" in run.said(), run.said()
    assert "Traceback" not in run.said(), run.said()


def begun(run: Run) -> list[int]:
    """The two ranks' processes, once rank 0 is under the watch and rank 1 has had time to be."""
    assert runs.until(lambda: (run.out / ".lock").exists() or run.all_ended(), 200), run.said()
    time.sleep(5.0)
    pids = run.pids()
    assert len(pids) == 2 and all(map(runs.alive, pids)), run.said()
    return pids


def test_a_token_past_the_vocabulary_in_one_ranks_data_ends_all(start: Callable[..., Run], folder: Path) -> None:
    data = runs.write_corpus(folder / "bad", bad=True)
    run = start(runs.start_ranks, "token", [*runs.MODEL, *ENDLESS, *data], world=2)
    pids = run.pids()
    all_gone(run, pids, 60)
    assert run.codes().count(2) >= 1 and 0 not in run.codes(), run.said()
    assert "60000" in run.said() and "vocabulary" in run.said(), run.said()
