"""What happens around a step besides training: evaluation, checkpoints, metrics, the console, garbage collection."""

from __future__ import annotations

import atexit
import gc
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from engine.comm.heart import Heart, Phase


@dataclass
class StepRecord:
    """What is known of a step. `tokens` are the global batch's without padding, `supervised` those that the loss is
    taken on. Times in seconds, memory in bytes (the peak of rank 0's device or process); `crc` is a checksum of the
    tokens the step read; `stopped` is set where the ranks have agreed to stop here; `skipped` where the loss or the
    gradient norm is not finite and no weight has moved."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised: int
    tokens_per_s: float
    mfu: float | None
    step_s: float
    data_s: float
    memory: int
    crc: int
    stopped: bool = False
    skipped: bool = False
    valid_loss: float | None = None


class Callback(Protocol):
    """Called after every step, in the order of the list; every rank calls the same ones. One that may take long for a
    good reason says in the mesh's heart what it does."""

    def after_step(self, record: StepRecord, last: bool) -> None:
        """`last` on the run's last step, whether it was planned or asked for by a signal."""
        ...


@dataclass
class Evaluate:
    """Fills in `valid_loss` every so many steps and at the end. Who asks to stop wants a checkpoint, not an evaluation:
    `evaluate` then returns None, and the step is the last."""

    every: int
    evaluate: Callable[[], float | None]

    def after_step(self, record: StepRecord, last: bool) -> None:
        if not record.stopped and (last or (self.every and record.step % self.every == 0)):
            record.valid_loss = self.evaluate()
            record.stopped = record.valid_loss is None


@dataclass
class Save:
    """Saves a checkpoint every so many steps and at the end. `save(wait, skipped)` returns when it stands on the disk
    where `wait` is set, else when training may go on; `skipped` says that the step moved no weight."""

    every: int
    save: Callable[[bool, bool], None]
    wait: bool = False
    """After every one; after the last one it is waited for anyway."""
    heart: Heart = field(default_factory=Heart)

    def after_step(self, record: StepRecord, last: bool) -> None:
        if last or (self.every and record.step % self.every == 0):
            self.heart.enter(Phase.SAVE)
            self.save(last or self.wait, record.skipped)


def metrics_line(record: StepRecord) -> dict[str, Any]:
    """The line of metrics.jsonl: all digits of every float, null where it is not finite (JSON has no such numbers), no
    valid_loss where nothing was evaluated, and `skipped` where the step was."""
    line = {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(record).items()}
    del line["crc"], line["stopped"]
    if record.valid_loss is None:
        del line["valid_loss"]
    if not record.skipped:
        del line["skipped"]
    return line


@dataclass
class WatchFolder:
    """Ends the run when the run folder was deleted, moved away or replaced under it; on rank 0, after `Save`.

    What has been trained is not thrown away: `stop` asks for the run's end, and with it comes a last checkpoint."""

    in_place: Callable[[], bool]
    stop: Callable[[], None]
    lost: int | None = None
    """The step after which the folder was not there."""

    def after_step(self, record: StepRecord, last: bool) -> None:
        if self.lost is None and not self.in_place():
            self.lost = record.step
            self.stop()


class CollectGarbage:
    """Owns the garbage collector: Python starts it on each rank at another moment, and all wait for the slowest."""

    def __init__(self, every: int = 50) -> None:
        self.every = every
        gc.disable()
        gc.collect()
        gc.freeze()  # what lives now (modules, the model) is never looked at again
        atexit.register(gc.unfreeze)  # else nanobind finds Triton's objects alive at the end, and complains

    def after_step(self, record: StepRecord, last: bool) -> None:
        if record.step % self.every == 0:
            gc.collect(1)


class Console:
    """The log line, and on a terminal a progress bar below it; on rank 0 only."""

    def __init__(self, steps: int, start: int, every: int) -> None:
        self.steps, self.every = steps, every
        self.skipped = 0
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.task = self.bar.add_task("steps", total=steps, completed=start)
            self.bar.start()

    def after_step(self, record: StepRecord, last: bool) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=record.step)
        self.skipped += record.skipped
        if (last or record.step % self.every == 0 or record.step == 1 or record.valid_loss is not None
                or record.skipped):
            self.say(self.text(record))
        if last:
            self.close()

    def text(self, record: StepRecord) -> str:
        """`step 20/200 | loss 5.1234 | ...`."""
        learned = f" ({record.supervised / record.tokens:.0%} learned)" if record.supervised < record.tokens else ""
        parts = [f"step {record.step}/{self.steps}", f"loss {record.loss:.4f}", f"lr {record.lr:.2e}",
                 f"grad norm {record.grad_norm:.3f}", f"{record.tokens_per_s:,.0f} tokens/s{learned}",
                 f"{record.step_s:.3f} s/step", f"data {record.data_s * 1e3:.1f} ms",
                 f"memory {record.memory / 2**30:.2f} GiB"]
        if record.skipped:
            parts.append(f"skipped: no weight has moved (skipped since the start: {self.skipped})")
        if record.mfu is not None:
            parts.insert(5, f"mfu {record.mfu:.1%}")
        if record.valid_loss is not None:
            parts.insert(2, f"held-back loss {record.valid_loss:.4f}")
        return " | ".join(parts)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this rank: the device allocator's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
