"""Saving beside training: a copy of the state is taken during the next step, and a thread writes it.

Weights and optimizer state change in the optimizer's update alone. So the copy is made while the next step runs forward
and backward, and only its update waits for it. The ranks agree on the phases of a save by two numbers, which travel in
the message with which every step ends. So no rank waits for another, unless the next save comes before this one has
ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.save import Agree, Assets, SaveWork, parts_of
from engine.checkpoint.slices import Entry, Part
from engine.errors import UserError

ALIGNMENT = 64
"""Bytes at a multiple of which each copied tensor begins."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that stands on the disk; in seconds, how long this rank's part of it took, and how long training
    stood still."""

    folder: Path
    seconds: float
    waited: float


class BackgroundSave:
    """Writes this rank's part of one checkpoint after the other, each beside the steps that follow it.

    Every rank calls `save` after the same steps; `numbers`, `heard` and `before_update` are what a step calls. Where a
    save has failed on any rank, every rank raises UserError in the same `heard`, and nothing of that save is left.
    """

    def __init__(self, root: Path, *, rank: int, world: int, agree: Agree, device: torch.device,
                 told: Callable[[Saved], None] = lambda saved: None) -> None:
        """`root` is RUN/checkpoints; `told` is called when a checkpoint stands, on every rank."""
        self.root, self.rank, self.world, self.agree, self.told = root, rank, world, agree, told
        self.staging = Staging(device)
        self.running: _Running | None = None

    def save(self, step: int, entries: Iterable[Entry], *, meta: Mapping[str, Any], assets: Assets, keep: int = 0,
             before: Callable[[], None] = lambda: None) -> None:
        """Begins to save a step, as `save_checkpoint` does, and returns; first waits for the save before it, if it is
        still being written. `before` runs on rank 0 before the checkpoint gets its name."""
        self.finish()
        start = time.perf_counter()
        work = SaveWork(self.root, step, parts_of(entries), rank=self.rank, world=self.world, meta=meta, assets=assets,
                        keep=keep, before=before)
        self.running = _Running(work, self.staging, start)
        self.running.thread.start()
        self.running.waited += time.perf_counter() - start

    def before_update(self) -> None:
        """Returns when the state has been copied and may change."""
        if self.running is not None and not self.running.copied.is_set():
            start = time.perf_counter()
            self.running.copied.wait()
            self.running.waited += time.perf_counter() - start

    def numbers(self) -> tuple[float, float]:
        """(whether this rank has ended the present phase, whether it has failed), to be summed over all ranks."""
        return self.running.state() if self.running is not None else (0.0, 0.0)

    def heard(self, ended: float, failed: float, /) -> None:
        """Takes the sums of all ranks' `numbers`; raises UserError on every rank where any has failed."""
        running = self.running
        if running is None:
            return
        if failed:
            self.running = None
            running.cancel()
            running.thread.join()  # nobody writes there any more when rank 0 deletes it
            raise running.work.failed(running.error, self.agree) from running.error
        if ended == self.world:
            running.agree_on_phase()
        if running.agreed == len(running.work.phases):
            self.running = None
            self.told(Saved(running.work.final, running.ended - running.start, running.waited))

    def finish(self) -> None:
        """Returns when the save under way stands on the disk; every rank calls it after the same step."""
        while (running := self.running) is not None:
            start = time.perf_counter()
            running.wait_for_phase()
            running.waited += time.perf_counter() - start
            self.heard(*self.agree(self.numbers()))

    def abandon(self) -> None:
        """Gives up the save under way, for a run that ends by an error of this rank; what is written of it is deleted
        where this rank is rank 0."""
        running, self.running = self.running, None
        if running is not None:
            running.cancel()
            running.thread.join()
            if self.rank == 0 and running.done < len(running.work.phases):
                running.work.discard()


class _Cancelled(Exception):
    """The save is not wanted any more."""


class _Running:
    """One save under way: its thread, how far this rank is, and how far all ranks are known to be."""

    def __init__(self, work: SaveWork, staging: Staging, start: float) -> None:
        self.work, self.start, self.ended = work, start, start
        self.waited = 0.0
        self.copied = threading.Event()
        self.error: Exception | None = None
        self.done = self.agreed = 0  # phases
        self.cancelled = False
        self.turn = threading.Condition()  # held for every change of what the two threads share
        self.copy = staging.begin(work.parts)
        # A rank that crashes must not wait for its disk: the thread does not keep the process alive.
        self.thread = threading.Thread(target=self._run, name=f"save-{work.step}", daemon=True)

    def _run(self) -> None:
        try:
            try:
                self.work.parts = [self._checked(part) for part in self.copy()]
            finally:
                self.copied.set()
            for phase in self.work.phases:
                self._wait_for_turn()
                phase()
                with self.turn:
                    self.ended = time.perf_counter()
                    self.done += 1
                    self.turn.notify_all()
        except _Cancelled:
            return
        except Exception as error:
            with self.turn:
                self.error = error
                self.turn.notify_all()

    def _checked(self, part: Part) -> Part:
        """The part, whose reading ends a save that was cancelled: a large one is written for minutes."""
        def read() -> torch.Tensor:
            if self.cancelled:
                raise _Cancelled
            return part.read()

        return replace(part, read=read)

    def _wait_for_turn(self) -> None:
        """Until the present phase may begin: when all ranks have ended the one before."""
        with self.turn:
            self.turn.wait_for(lambda: self.cancelled or self._allowed() >= self.done)
            if self.cancelled:
                raise _Cancelled

    def _allowed(self) -> int:
        """The last phase that this rank may begin."""
        if self.work.world == 1:
            return len(self.work.phases)
        return max(self.agreed, 1 if self.work.rank == 0 else 0)  # rank 0 writes into the folder that it has made

    def state(self) -> tuple[float, float]:
        """See `BackgroundSave.numbers`."""
        with self.turn:
            return float(self.done > self.agreed), float(self.error is not None)

    def agree_on_phase(self) -> None:
        """All ranks have ended the present phase."""
        with self.turn:
            self.agreed = self.done if self.work.world == 1 else self.agreed + 1
            self.turn.notify_all()

    def wait_for_phase(self) -> None:
        """Until this rank has ended the present phase, or has failed."""
        with self.turn:
            self.turn.wait_for(lambda: self.done > self.agreed or self.error is not None)

    def cancel(self) -> None:
        """Ends the thread as soon as it can."""
        with self.turn:
            self.cancelled = True
            self.turn.notify_all()


class Staging:
    """Host memory for one copy of what a rank saves; kept from save to save, since new pages cost more than copying."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[Part]]:
        """What another thread calls to copy the parts as they are now; it returns parts that read the copy. Their
        tensors must not change before it has returned."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the update of this step comes first

        def copy() -> list[Part]:
            places = _places(parts)
            self._reserve(places[-1])
            if self.stream is None:
                return [_copied(part, self.memory, place) for part, place in zip(parts, places, strict=False)]
            with torch.cuda.stream(self.stream):
                found = [_copied(part, self.memory, place) for part, place in zip(parts, places, strict=False)]
                self.stream.synchronize()
            return found

        return copy

    def _reserve(self, size: int) -> None:
        if self.memory.numel() < size:
            self.memory = torch.empty(0, dtype=torch.uint8)  # first: both at once may be more than there is
            try:
                self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
                return
            except RuntimeError:
                pass  # perhaps the system only pins no more memory: a slower copy will do
            try:
                self.memory = torch.empty(size, dtype=torch.uint8)
            except RuntimeError:
                raise UserError(f"the machine has no {size / 1e6:,.0f} MB of main memory for a copy of this rank's "
                                "state; use --save-wait, which takes none") from None


def _places(parts: Sequence[Part]) -> list[int]:
    """Where each part's copy begins, and at last where all of them end."""
    places = [0]
    for part in parts:
        places.append(-(-(places[-1] + part.bytes) // ALIGNMENT) * ALIGNMENT)
    return places


def _copied(part: Part, memory: torch.Tensor, place: int) -> Part:
    """The part, whose values are copied to a place in `memory`."""
    source = part.read().detach()
    copy = memory[place : place + part.bytes].view(part.dtype).view(part.extent)
    if source.device.type == "cpu" and source.is_contiguous() and source.numel():
        # By numpy, in this thread alone: torch would take as many threads again as training has.
        np.copyto(_bytes(copy), _bytes(source))
    else:
        copy.copy_(source, non_blocking=True)
    return replace(part, read=lambda: copy)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
