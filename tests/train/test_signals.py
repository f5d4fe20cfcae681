"""A signal that asks a run to stop: what is done is saved first, nothing is evaluated, nobody is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs
from runs import Run

from engine.checkpoint import latest_step, open_checkpoint
from engine.train.callbacks import Evaluate, StepRecord
from engine.train.signals import StopRequest

STEPS = ["--steps", "100000", "--keep", "1"]
SECONDS = 60.0
"""In which everything has ended, on a loaded machine."""
PROGRAM = '''
"""engine.pretrain, made slow in one place, where it leaves a mark."""
import os, sys, time
from pathlib import Path
from engine import pretrain
from engine.parallel.executor import Executor
from engine.checkpoint.save import SaveWork
from engine.train.entry import enter
from engine.train.request import EntryPoint

WHERE, MARK = os.environ["SLOW"], os.environ["MARK"]

def slow(function, seconds):
    def slowed(*given, **named):
        with open(MARK, "a") as mark:
            mark.write("x")
        time.sleep(seconds)
        return function(*given, **named)
    return slowed

if WHERE == "save":
    SaveWork.write = slow(SaveWork.write, 2.0)
if WHERE == "evaluation":
    Executor.evaluate = slow(Executor.evaluate, 0.5)
make_feed = slow(pretrain.make_feed, 1000.0) if WHERE == "start" else pretrain.make_feed
sys.exit(enter(EntryPoint("slow", {}, pretrain.check_data), sys.argv[1:], (), (), make_feed))
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return runs.write_corpus(tmp_path_factory.mktemp("signals") / "corpus")


@pytest.fixture
def start() -> Iterator[Callable[[Run], Run]]:
    """Ends with the test what was started in it."""
    started: list[Run] = []

    def keep(run: Run) -> Run:
        started.append(run)
        return run

    yield keep
    for run in started:
        run.kill()


def slow(folder: Path, where: str, **more: str) -> dict[str, str]:
    """The environment of `PROGRAM`, which it writes."""
    (folder / "slow.py").write_text(PROGRAM)
    return {"SLOW": where, "MARK": str(folder / "mark"), **more}


def marked(folder: Path, ranks: int) -> bool:
    path = folder / "mark"
    return path.exists() and len(path.read_text()) >= ranks


def saved_at_the_last_line(run: Run) -> int:
    """The step of the newest checkpoint, which is sound and that of the last line of metrics."""
    last = latest_step(run.out)
    assert last is not None, run.said()
    step = open_checkpoint(last).step
    assert step == run.metrics()[-1]["step"]
    return step


@pytest.mark.slow
def test_each_warning_saves_first_evaluates_nothing_and_asks_to_be_requeued(
        start: Callable[[Run], Run], data: list[str], tmp_path: Path) -> None:
    flags = [*runs.MODEL, *STEPS, *data, "--valid-data", data[1], "--requeue-exit"]
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        run = start(runs.start_ranks(tmp_path / number.name, flags, world=1))
        run.wait_for_step(2)
        run.ranks[0].send_signal(number)
        assert run.codes() == [75], run.said()
        step = saved_at_the_last_line(run)
        assert f"stopped by {number.name} at step {step} of 100000" in run.said()
        assert all("valid_loss" not in line for line in run.metrics())


@pytest.mark.parametrize("layout", [pytest.param("--tp 2 --save-wait", marks=pytest.mark.slow),
                                    pytest.param("--tp 2", marks=pytest.mark.slow),
                                    pytest.param("--pp 2", marks=pytest.mark.soak),
                                    pytest.param("--save-wait", marks=pytest.mark.soak)])
def test_a_signal_in_a_save_ends_the_run_after_it(start: Callable[[Run], Run], data: list[str], tmp_path: Path,
                                                  layout: str) -> None:
    flags = [*runs.MODEL, *STEPS, *data, "--save-every", "2", *layout.split()]
    run = start(runs.start_ranks(tmp_path / "out", flags, world=2, program=[str(tmp_path / "slow.py")],
                                 env=slow(tmp_path, "save"), launcher=runs.slurm_step))
    assert runs.until(lambda: marked(tmp_path, 2), 90), run.said()
    for rank in run.ranks:
        rank.terminate()
    assert run.codes() == [0, 0], run.said()
    step = saved_at_the_last_line(run)
    assert f"stopped by SIGTERM at step {step}" in run.said() and "Traceback" not in run.said()
    assert step == 3 or "--save-wait" not in layout
    assert "checkpoints/step-00000002 in" in run.said(), "the save before it was not ended"


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_and_saves(start: Callable[[Run], Run], data: list[str],
                                                     tmp_path: Path) -> None:
    flags = [*runs.MODEL, *STEPS, *data, "--valid-data", data[1], "--eval-every", "1", "--micro-batch", "1",
             "--eval-samples", "60"]
    run = start(runs.start_ranks(tmp_path / "out", flags, world=2, program=[str(tmp_path / "slow.py")],
                                 env=slow(tmp_path, "evaluation")))
    assert runs.until(lambda: marked(tmp_path, 1), 90), run.said()
    run.ranks[1].terminate()
    assert run.codes() == [0, 0], run.said()
    assert saved_at_the_last_line(run) == 1 and "valid_loss" not in run.metrics()[0]
    assert len((tmp_path / "mark").read_text()) < 2 * 4, "the held-back set was evaluated to its end"


@pytest.mark.parametrize("how", [pytest.param("launcher", marks=pytest.mark.slow),
                                 pytest.param("ranks", marks=pytest.mark.soak)])
def test_a_signal_before_the_first_step_leaves_nobody_and_no_traceback(
        start: Callable[[Run], Run], data: list[str], tmp_path: Path, how: str) -> None:
    flags = [*runs.MODEL, *STEPS, *data, "--requeue-exit"]
    program, env = [str(tmp_path / "slow.py")], slow(tmp_path, "start")
    if how == "ranks":
        run = start(runs.start_ranks(tmp_path / "out", flags, world=2, program=program, env=env))
    else:
        run = start(runs.torchrun(tmp_path / "out", flags, world=2, program=program, env=env))
    assert runs.until(lambda: marked(tmp_path, 2), 90), run.said()
    pids = run.pids()
    for process in run.ranks or [run.launcher]:
        assert process is not None
        process.terminate()
    assert runs.until(lambda: run.all_ended() and not any(map(runs.alive, pids)), SECONDS), run.said()
    assert "stopped by SIGTERM before the first step; nothing to save" in run.said()
    assert run.said().count("Traceback") == (how == "launcher"), "torchrun prints its own"
    assert run.codes() == ([75, 75] if how == "ranks" else [1])
    assert latest_step(run.out) is None


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        stop.begin()
        os.kill(os.getpid(), signal.SIGINT)
        assert runs.until(lambda: stop.asked, 10) and stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            runs.until(lambda: False, 10)


def test_what_the_starter_ignores_stays_ignored_and_handlers_return() -> None:
    """nohup ignores SIGHUP: the run is meant to outlive its terminal."""
    before = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.begin()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not runs.until(lambda: stop.asked, 0.3)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert runs.until(lambda: stop.asked, 10) and stop.name == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is before[1]
    finally:
        signal.signal(signal.SIGHUP, before[0])


def test_the_thread_that_listens_ends_with_the_block() -> None:
    for _ in range(20):
        with StopRequest() as stop:
            pass
        assert not stop.listener.is_alive() and "signals" not in {thread.name for thread in threading.enumerate()}


def test_a_run_that_is_stopped_is_not_evaluated() -> None:
    def record(stopped: bool) -> StepRecord:
        return StepRecord(step=1, loss=1.0, lr=1.0, grad_norm=1.0, tokens=1, supervised=1, tokens_per_s=1.0, mfu=None,
                          step_s=1.0, data_s=1.0, memory=1, crc=1, stopped=stopped)

    asked: list[int] = []
    evaluate = Evaluate(1, lambda: asked.append(1))  # type: ignore[func-returns-value]
    evaluate.after_step(record(stopped=True), True)
    assert not asked
    one = record(stopped=False)
    evaluate.after_step(one, False)
    assert asked and one.stopped, "ranks that agree to stop in the middle of it stop at this step"
