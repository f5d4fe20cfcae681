"""How the end of a run reads when a rank is killed, or hangs in a library that keeps Python's lock."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs
from runs import Run

PROGRAM = '''
"""engine.pretrain, where rank 1 holds Python's lock for good at its fifth step."""
import ctypes, dataclasses, os, sys
from engine import pretrain
from engine.train.entry import enter
from engine.train.request import EntryPoint

class Held:
    def __init__(self, batches):
        self.batches = batches
    def step(self, step):
        if step == 4 and os.environ["RANK"] == "1":
            ctypes.PyDLL(None).sleep(1000)
        return self.batches.step(step)

def make_feed(job, mesh, origin):
    feed = pretrain.make_feed(job, mesh, origin)
    return dataclasses.replace(feed, batches=Held(feed.batches))

sys.exit(enter(EntryPoint("held", {}, pretrain.check_data), sys.argv[1:], (), (), make_feed))
'''
FORMS = [runs.start_ranks, runs.torchrun]
TIMEOUT = 20.0


def lines_of(run: Run) -> list[str]:
    """What was said, once it is known to hold no C++ frames and no traceback but torchrun's own."""
    said = run.said()
    assert "frame #" not in said and "Exception raised from" not in said, said
    assert said.count("Traceback (most recent call last)") == (run.launcher is not None), said
    assert ("ChildFailedError" in said) == (run.launcher is not None), said
    return [line.strip() for line in said.splitlines()]


def assert_said(run: Run, *causes: str) -> None:
    """Asserts that ranks that say why they end give the cause, and torchrun's closing block ends with it."""
    lines = lines_of(run)
    ends = [line for line in lines if "this rank ends without saving" in line]
    assert all(any(cause in line for cause in causes) for line in ends), run.said()
    if run.launcher is None:
        assert ends, run.said()
    else:  # the agent may see the death first, and end the other rank before that one has spoken
        closing = [line for line in lines if line.startswith("traceback :")][-1]
        assert any(cause in closing for cause in causes), closing


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
def test_a_rank_that_keeps_pythons_lock_is_named_by_the_others_and_shows_where(
        tmp_path: Path, form: Callable[..., Run]) -> None:
    """No thread of that rank runs: the others see its silence, and a timer that needs no lock shows its stack."""
    (tmp_path / "held.py").write_text(PROGRAM)
    data = runs.write_corpus(tmp_path / "corpus")
    flags = [*runs.MODEL, "--pp", "2", "--steps", "100", *data, "--timeout", f"{TIMEOUT:g}"]
    run = form(tmp_path / "out", flags, world=2, program=[str(tmp_path / "held.py")])
    try:
        run.wait_for_step(1)  # what is read ahead holds the lock before step 5, just after the slow phase of opening
        pids = run.pids()
        assert runs.until(lambda: run.all_ended() and not any(map(runs.alive, pids)), TIMEOUT + 60), run.said()
    finally:
        run.kill()
    assert 0 not in run.codes()
    assert_said(run, f"rank 1 (process {pids[1]} on ")
    assert "does not respond (stopped, or its machine is gone); it was last seen in " in run.said()
    assert 'held.py", line 13 in step' in run.said(), run.said()


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_in_one_line_and_no_frames_are_shown(
        tmp_path: Path, form: Callable[..., Run], victim: int) -> None:
    data = runs.write_corpus(tmp_path / "corpus")
    run = form(tmp_path / "out", [*runs.MODEL, "--pp", "2", "--steps", "100000", "--keep", "1", *data], world=2)
    try:
        run.wait_for_step(2)
        pids = run.pids()
        os.kill(pids[victim], signal.SIGKILL)
        assert runs.until(lambda: run.all_ended() and not any(map(runs.alive, pids)), 100), run.said()
    finally:
        run.kill()
    assert_said(run, f"rank {victim} (process {pids[victim]}) has died", "rank 0 is gone, and its store with it",
                f"Signal 9 (SIGKILL) received by PID {pids[victim]}")
