"""Signals that ask a run to stop: a batch system's warning, a closed terminal, Ctrl-C.

Before the first step there is nothing to save, and the process ends at once. From then on a signal sets a flag: ranks
agree on it at a step's end, save, and exit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from engine.train.launch import INTERRUPTED

STOPPED, REQUEUE = 0, 75
"""Exit codes of a run that a signal has stopped; 75 (EX_TEMPFAIL, sysexits.h) with --requeue-exit."""
END = b"\0"
"""What ends the thread that listens; no signal has this number."""
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Handles the signals of `ASKING` inside a `with` block. One that the starter has set to be ignored (nohup) stays
    so.

    `end_early(code, line)` ends the run's other ranks in order, when a signal comes before the first step."""

    def __init__(self, end_early: Callable[[int, str], None] = lambda code, line: None, code: int = STOPPED) -> None:
        self.end_early, self.code = end_early, code
        self.signal: signal.Signals | None = None
        self.requested = False
        self.training = False
        self.interrupts = 0
        self.lock = threading.Lock()
        self.before: dict[signal.Signals, object] = {}

    @property
    def asked(self) -> bool:
        """Whether the run shall stop."""
        return self.signal is not None or self.requested

    def request(self) -> None:
        """Asks for the run's end as a signal would, from within."""
        self.requested = True

    @property
    def name(self) -> str:
        """`SIGTERM`, or `a signal` where another rank got it."""
        return self.signal.name if self.signal else "a signal"

    def __enter__(self) -> StopRequest:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        for number in ASKING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._handle)
        # The interpreter runs `_handle` when the main thread is in Python again, and it may wait in a library for
        # minutes: the number also goes, at once, through a pipe to a thread.
        self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.listener = threading.Thread(target=self._listen, daemon=True, name="signals")
        self.listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.write(self.writer, END)  # not only closed: a forked process may hold the other end open
        self.listener.join()
        os.close(self.writer)

    def begin(self) -> None:
        """The first step begins: from now on there is something to save."""
        with self.lock:
            self.training = True

    def _listen(self) -> None:
        with contextlib.closing(os.fdopen(self.reader, "rb", buffering=0)) as pipe:
            while (data := pipe.read(1)) and data != END:
                if data[0] in ASKING:
                    self._ask(signal.Signals(data[0]))

    def _ask(self, number: signal.Signals) -> None:
        with self.lock:
            if self.training:
                self.signal = self.signal or number
                return
            code = INTERRUPTED if number == signal.SIGINT else self.code
            self.end_early(code, f"stopped by {number.name} before the first step; nothing to save")
            sys.stdout.flush()
            os._exit(code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """A second Ctrl-C ends at once; the thread does the rest."""
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
