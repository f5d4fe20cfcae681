"""Batches read ahead by a thread: while a step trains, the next ones come from the disk."""

from __future__ import annotations

import threading
from types import TracebackType

from engine.data.batches import Batch, Batches

_PATIENCE = 5.0  # seconds that closing waits for a read under way; the thread ends with the process in any case


class Prefetch:
    """Gives what `batches` gives, at most `ahead` batches of it read before they are asked for.

    Steps may be asked for in any order, since they are a pure function; ahead is read what follows the last one asked
    for. What a read raises is raised by the step that asks for it, with the traceback of the reading thread; the next
    time that step is read again. Reading begins at once, with step `first`, and goes no further than `stop`. Use as a
    context manager, or close it.
    """

    def __init__(self, batches: Batches, first: int, stop: int, ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"{ahead} batches ahead: one is the least")
        self._batches, self._stop, self._ahead = batches, stop, ahead
        self._next = first  # the step that is asked for, or that will be
        self._read: dict[int, Batch | BaseException] = {}
        self._closed = False
        self._changed = threading.Condition()  # guards everything above
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def step(self, step: int) -> Batch:
        """The batch of a step below `stop`; waits where it has not been read yet."""
        if step >= self._stop:
            raise ValueError(f"step {step} is not below {self._stop}, where reading stops")
        with self._changed:
            if self._closed:
                raise ValueError(f"step {step} of batches that are closed")
            self._next = step
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._read)
            found = self._read.pop(step)
            self._next = step + 1
            self._changed.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Ends the thread; a read under way is waited for, though not for ever: a disk may hang."""
        with self._changed:
            self._closed = True
            self._read.clear()
            self._changed.notify_all()
        self._thread.join(_PATIENCE)

    def _wanted(self) -> int | None:
        """The first step of the window that is not there yet."""
        window = range(self._next, min(self._next + self._ahead, self._stop))
        for step in [step for step in self._read if step not in window]:
            del self._read[step]
        return next((step for step in window if step not in self._read), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted() is not None)
                step = self._wanted()
                if self._closed or step is None:
                    return
            found: Batch | BaseException
            try:
                found = self._batches.step(step)
            except BaseException as error:  # whatever it is, the step that asks shall know
                found = error
            with self._changed:
                if not self._closed:
                    self._read[step] = found
                    self._changed.notify_all()
            del found  # a batch that is being trained on is not kept here as well

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
