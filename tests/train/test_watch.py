"""The watch without processes that die: what follows from hearts, and two watches at one store."""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from engine.comm.heart import Heart, Phase, Waited
from engine.config import RunConfig
from engine.config.flags import build
from engine.train.callbacks import Callback, Save, StepRecord
from engine.train.engine import StepResult
from engine.train.loop import train
from engine.train.rendezvous import end_run, linger
from engine.train.signals import StopRequest
from engine.train.watch import Limits, Watch
from engine.train.watch import watch as module
from engine.train.watch.guard import GRACE, Guard
from engine.train.watch.processes import Process, Processes
from engine.train.watch.pulse import Finding, Pulse, Stillness, verdict

SECONDS = 60.0
"""What a loaded machine may take for anything here."""
BUSY = Pulse(count=7, beats=40, still=0.2, waiting=False, step=5, phase=Phase.DATA, pid=11, host="node7")
WAITS = replace(BUSY, waiting=True, phase=Phase.FORWARD, still=30.0)


def later(*pulses: Pulse) -> list[Pulse]:
    """The same hearts at the next look: each watch has published again, and nobody has got on."""
    return [replace(pulse, count=pulse.count + 4) for pulse in pulses]


def test_a_pulse_is_read_as_it_was_written() -> None:
    assert Pulse.parse(BUSY.text()) == BUSY and Pulse.parse("") is None
    found = Finding(3, "rank 3 has died of 2 things", 2)
    assert Finding.parse(found.line()) == found and Finding.parse("") is None


def test_a_rank_whose_watch_is_silent_is_named_with_its_machine_and_phase() -> None:
    before = [WAITS, replace(BUSY, phase=Phase.BACKWARD), WAITS]
    after = [*later(WAITS), before[1], *later(WAITS)]
    found = verdict(before, after, 8)
    assert found is not None and found.rank == 1
    assert found.text == ("rank 1 (process 11 on node7) does not respond (stopped, or its machine is gone); "
                          "it was last seen in backward at step 5")


def test_a_rank_that_works_is_waited_for() -> None:
    assert verdict([WAITS, BUSY], later(WAITS, BUSY), 8) is None, "it has a limit of its own, and watches over itself"
    moved = [later(WAITS)[0], replace(later(WAITS)[0], beats=41)]
    assert verdict([WAITS, WAITS], moved, 8) is None, "one of them has got on"


def test_ranks_that_wait_for_each_other_name_the_one_furthest_behind() -> None:
    behind = replace(WAITS, step=4, beats=90)
    found = verdict([WAITS, behind], later(WAITS, behind), 8)
    assert found is not None and found.rank == 1
    assert "rank 1 (process 11 on node7) is furthest behind: in a collective (forward) at step 4" in found.text


def test_a_rank_that_never_came_is_named() -> None:
    found = verdict([WAITS, None, None], [*later(WAITS), None, None], 8)
    assert found is not None and found.text == "ranks 1, 2 have not come to the meeting within 8 s"


def test_time_in_which_the_observer_was_stopped_does_not_count() -> None:
    still = Stillness(5.0)
    assert [still.look("a", now) for now in (0.0, 1.0, 2.0)] == [0.0, 1.0, 2.0]
    assert still.look("a", 1000.0) == 7.0 and still.look("b", 1001.0) == 0.0


def test_saving_and_start_up_have_a_limit_of_their_own_and_transports_give_up_last() -> None:
    limits = Limits(5.0, 300.0)
    assert [limits.of(phase) for phase in (Phase.DATA, Phase.SAVE, Phase.START, Phase.MEETING)] == [5, 300, 300, 5]
    assert limits.last > max(limits.peers, limits.disk)


def test_the_first_process_to_end_is_known_first() -> None:
    processes = Processes()
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)]
    try:
        for rank, child in enumerate(children):
            processes.add(rank, Process.of(child.pid))
        for rank in (2, 0):
            children[rank].kill()
            while rank not in processes.gone:
                processes.wait(0.1)
        assert processes.gone == [2, 0]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_the_guard_ends_a_rank_whose_first_thread_is_silent() -> None:
    ended = threading.Event()
    looks = iter(range(3))
    guard = Guard(lambda: next(looks, 3), lambda seconds: ended.set(), 1.0, lambda: 1000.0)
    guard.start()
    assert ended.wait(SECONDS)
    guard.stop()


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class End(BaseException):
    """Stands for the process's end."""


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Limits], list[Watch]]]:
    """Starts the watches of two ranks at one store; `ended` of each is its exit code."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    started: list[Watch] = []

    def leave(code: int) -> None:
        me = threading.current_thread()
        next(watch for watch in started if me in (watch, watch.guard)).code = code  # type: ignore[attr-defined]
        raise End

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def start(limits: Limits) -> list[Watch]:
        for rank in range(2):
            own = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
            watch = Watch(own, rank, 2, limits, served="rank 0", serves=rank == 0)
            watch.code = None  # type: ignore[attr-defined]
            watch.machine = f"machine {rank}".replace(" ", "-")
            started.append(watch)
            watch.start()
        return started

    yield start
    for watch in started:
        watch.ended.set()
        watch.guard.stop()


def test_a_rank_that_keeps_the_lock_at_once_has_come_and_its_timer_has_the_limit_of_its_phase(
        pair: Callable[[Limits], list[Watch]], monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread of it has run since it was written down, or since it entered a phase with another limit."""
    monkeypatch.setattr(Watch, "run", lambda watch: None)
    monkeypatch.setattr(Guard, "run", lambda guard: None)
    first, second = pair(Limits(5.0, 300.0))
    assert None not in first._all_pulses() and None not in second._all_pulses()
    armed: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **more: armed.append(seconds))
    for phase in (Phase.START, Phase.DATA, Phase.FORWARD, Phase.SAVE, Phase.CALLBACK):
        second.heart.enter(phase)
    assert armed == [300 + GRACE, 5 + GRACE, 300 + GRACE, 5 + GRACE]


def codes(watches: list[Watch]) -> list[int | None]:
    return [watch.code for watch in watches]  # type: ignore[attr-defined]


def test_a_transport_that_never_raises_is_no_reason_to_wait_for_ever(
        pair: Callable[[Limits], list[Watch]], capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 waits in a collective that will neither end nor raise, since rank 1 sleeps in its data."""
    waiting, hung = watches = pair(Limits(2.0, 1000.0))
    hung.heart.enter(Phase.DATA, 5)
    waiting.heart.enter(Phase.FORWARD, 5)
    threading.Thread(target=Waited(Deaf(), waiting.heart).wait, daemon=True).start()
    assert until(lambda: codes(watches) == [1, 1]), codes(watches)
    said = capfd.readouterr().err
    assert said.count("hangs in data at step 5: nothing has moved for") == 2 and said.count("rank 1 (process") == 2
    assert "most recent call first" in said, "the one that hangs shows where"


class Frozen:
    """A store whose machine is stopped: nothing is answered."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None if name == "set_timeout" else time.sleep(10 * SECONDS)


def test_a_store_that_freezes_before_the_watch_has_begun(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    left = threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: left.set())
    watch = Watch(Frozen(), 0, 2, Limits(0.5, 1000.0), served="torchrun's agent",  # type: ignore[arg-type]
                  serves=False)
    threading.Thread(target=watch.start, daemon=True).start()
    assert left.wait(SECONDS)
    watch.guard.stop()
    said = capfd.readouterr().err
    assert "torchrun's agent does not respond" in said
    assert "most recent call first" not in said, "no rank is to blame, and none shows where it is"


class Deaf:
    """A collective that neither ends nor raises."""

    def wait(self) -> None:
        time.sleep(10 * SECONDS)


def test_ranks_that_all_wait_end_and_one_that_saves_for_long_is_waited_for(
        pair: Callable[[Limits], list[Watch]], capfd: pytest.CaptureFixture[str]) -> None:
    first, second = watches = pair(Limits(2.0, 1000.0))
    first.heart.enter(Phase.SAVE, 5)
    second.heart.enter(Phase.FORWARD, 6)
    second.heart.waiting = True
    time.sleep(6.0)
    assert codes(watches) == [None, None], capfd.readouterr().err
    first.heart.enter(Phase.FORWARD, 6)
    first.heart.waiting = True
    assert until(lambda: codes(watches) == [1, 1]), codes(watches)
    assert "all ranks wait for each other, rank " in capfd.readouterr().err


def test_a_crash_of_one_rank_ends_all_in_its_name(
        pair: Callable[[Limits], list[Watch]], capfd: pytest.CaptureFixture[str]) -> None:
    first, second = pair(Limits(1000.0, 1000.0))
    first.report(ValueError("the disk has gone"))
    assert until(lambda: codes([second]) == [1])
    said = capfd.readouterr().err
    assert said.count("rank 0 (rank 0 of 2) failed: ValueError: the disk has gone; this rank ends") == 1


def test_a_rank_that_ends_the_run_in_order_has_said_why_and_the_others_are_silent(
        pair: Callable[[Limits], list[Watch]], capfd: pytest.CaptureFixture[str]) -> None:
    first, second = pair(Limits(1000.0, 1000.0))
    first.ended.set()
    assert end_run(first.store, 0, 2, "error: another run is writing out/")
    linger(first.store, 2)
    assert until(lambda: codes([second]) == [2])
    assert "another run" not in capfd.readouterr().err


def test_the_end_of_the_run_is_no_fault(pair: Callable[[Limits], list[Watch]]) -> None:
    first, second = watches = pair(Limits(1000.0, 1000.0))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    second.processes.add(0, Process.of(child.pid))
    second.heart.enter(Phase.END)
    child.kill()
    child.communicate()
    looks = second.looks
    assert until(lambda: second.looks > looks + 2) and codes(watches) == [None, None]


def test_a_heart_is_seen_to_beat_before_it_is_seen_to_wait_no_more() -> None:
    heart, seen = Heart(), []

    class Spy(Heart):
        def __setattr__(self, name: str, value: object) -> None:
            seen.append(name)
            super().__setattr__(name, value)

    heart = Spy()
    seen.clear()
    with heart.waits():
        pass
    Waited(Immediate(), heart).wait()
    assert seen == ["waiting", "beats", "waiting"] * 2


class Immediate:
    """A collective that has ended."""

    def wait(self) -> None:
        return


class Sleepy:
    """A user's callback that hangs."""

    def after_step(self, record: StepRecord, last: bool) -> None:
        time.sleep(10 * SECONDS)


def one_step(heart: Heart, *callbacks: Callback) -> None:
    """Runs the loop for a step of nothing, with some callbacks, in a thread."""
    config: RunConfig = build({"steps": 1})
    nothing = SimpleNamespace(step=lambda step: None)
    mesh = SimpleNamespace(heart=heart)
    engine = SimpleNamespace(config=config, mesh=mesh, step=0, device=SimpleNamespace(type="cpu"))

    def train_step(batch: object, stop: bool) -> StepResult:
        engine.step += 1
        return StepResult(1.0, 1.0, 1e-3, 1, 1, 1, 0, False)

    engine.train_step = train_step
    arguments = cast(Any, (engine, nothing, callbacks, lambda rate: None, StopRequest()))
    threading.Thread(target=train, args=arguments, daemon=True).start()


def test_a_callback_that_hangs_has_the_limit_of_a_step_and_its_name_and_a_save_that_of_saves(
        pair: Callable[[Limits], list[Watch]], capfd: pytest.CaptureFixture[str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    waiting, slow = watches = pair(Limits(2.0, 1000.0))
    waiting.heart.waiting = True
    save = Save(1, lambda wait, skipped: time.sleep(10 * SECONDS), False, slow.heart)
    one_step(slow.heart, save)
    assert until(lambda: slow.heart.phase is Phase.SAVE)
    time.sleep(4.0)
    assert codes(watches) == [None, None], capfd.readouterr().err
    one_step(slow.heart, Sleepy(), save)
    assert until(lambda: codes(watches) == [1, 1]), codes(watches)
    assert capfd.readouterr().err.count("hangs in callback at step 1: nothing has moved for") == 2
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert "hangs in callback at step 1" in told, "torchrun's closing block ends with the cause"
