"""The pulse of a rank: what its main thread does, at which step, and whether it waits for other ranks.

The main thread writes it, by plain attributes since it lies on the hot path; the watch's thread (`engine/train/watch`)
reads it and tells the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol


class Phase(StrEnum):
    """What a rank is doing, in the words that messages use."""

    MEETING = "meeting"
    """The ranks look for each other and build their groups."""
    START = "start"
    """Weights and data are opened."""
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    SAVE = "save"
    """A checkpoint is written."""
    EVALUATION = "evaluation"
    CALLBACK = "callback"
    """What else happens after a step: lines of the run folder, the console, a user's own."""
    END = "end"
    """All work is done; the ranks take leave of each other."""


SLOW = frozenset((Phase.START, Phase.SAVE))
"""What a slow disk may hold up for long."""


class Heart:
    """What the main thread does. Every step forward, however small, is a beat. `turned` is called by the main thread
    when another limit begins: a phase of `SLOW`, or one that follows it."""

    def __init__(self) -> None:
        self.turned: Callable[[], None] = lambda: None
        self.step = 0
        self.phase = Phase.MEETING
        self.waiting = False
        self.beats = 0

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """The main thread begins something else."""
        before, self.phase = self.phase, phase
        if step is not None:
            self.step = step
        self.beats += 1
        if (before in SLOW) != (phase in SLOW):
            self.turned()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """While the main thread can only go on when other ranks do."""
        outer, self.waiting = self.waiting, True
        try:
            yield
        finally:
            self.beats += 1  # before the flag: who sees that this rank waits no more has then seen the beat
            self.waiting = outer

    def beat(self) -> None:
        """The main thread has got on."""
        self.beats += 1


class Work(Protocol):
    """An operation of torch.distributed under way."""

    def wait(self) -> object:
        """Returns when it has ended."""
        ...


class Waited:
    """An operation under way whose wait is seen in the heart."""

    def __init__(self, work: Work, heart: Heart) -> None:
        self.work, self.heart = work, heart

    def wait(self) -> None:
        """Returns when the operation has ended."""
        heart = self.heart  # the lines of `Heart.waits` again: a generator costs more than these
        outer, heart.waiting = heart.waiting, True
        self.work.wait()
        heart.beats += 1
        heart.waiting = outer
