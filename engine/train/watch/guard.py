"""The second thread of the watch, which makes no call that can block.

A store whose machine is frozen answers no call, and torch's own timeout does not cover it: the first thread then hangs
too. This one sees that the first is silent and ends the process. Where a thread keeps Python's lock for good, neither
runs: then a timer of faulthandler, which needs no lock, shows where that is, and ends the process.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from engine.train.watch.pulse import Stillness

EVERY = 0.5
GRACE = 10.0
"""Seconds after a limit in which this process may end by itself before faulthandler's timer ends it."""


class Guard(threading.Thread):
    """Calls `silent(seconds)`, which ends the process, once `looks()` has not changed for `limit` seconds."""

    def __init__(self, looks: Callable[[], int], silent: Callable[[float], None], limit: float,
                 hang_limit: Callable[[], float]) -> None:
        super().__init__(daemon=True, name="guard")
        self.looks, self.silent, self.limit, self.hang_limit = looks, silent, limit, hang_limit
        self.ended = threading.Event()

    def run(self) -> None:
        """Looks until it is stopped."""
        still = Stillness(10 * EVERY)
        while not self.ended.wait(EVERY):
            self.arm()
            seconds = still.look(self.looks(), time.monotonic())
            if seconds > self.limit:
                self.silent(seconds)

    def stop(self) -> None:
        """Ends the thread and its timer."""
        self.ended.set()
        if self.is_alive():
            self.join(2 * EVERY)  # not for ever: it may have found an end of its own at this moment
        faulthandler.cancel_dump_traceback_later()

    def arm(self) -> None:
        """Sets faulthandler's timer anew. This thread does so at each look, and the main thread where another limit
        begins: it may be the last thing it does before it keeps the lock."""
        if self.ended.is_set():
            return
        with suppress(RuntimeError, ValueError, OSError, AttributeError):  # an stderr that is no file
            faulthandler.dump_traceback_later(self.hang_limit() + GRACE, exit=True, file=sys.stderr)
