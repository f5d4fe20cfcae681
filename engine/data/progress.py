"""How far a long job has come: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_EVERY_S = 5.0


class Progress:
    """Counts bytes of input and documents; writes to stderr, so that stdout stays the result's."""

    def __init__(self, total_bytes: int, *, every_s: float = _EVERY_S) -> None:
        self._total, self._every = max(total_bytes, 1), every_s
        self._begun = self._said = time.monotonic()
        self._bytes = self._documents = 0
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            # Imported here: rich takes a tenth of a second, and most runs have no terminal.
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._total)

    def add(self, more_bytes: int, more_documents: int) -> None:
        """Says how far it is, being told what was done since the last call."""
        self._bytes, self._documents = self._bytes + more_bytes, self._documents + more_documents
        self.update(self._bytes, self._documents)

    def update(self, done_bytes: int, documents: int) -> None:
        """Says how far it is: input bytes read and documents done since the start."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.start()  # not before: its thread would keep a process from being forked
            self._bar.update(self._task, completed=done_bytes, description=self._text(done_bytes, documents, now))
        elif now - self._said >= self._every:
            self._said = now
            print(self._text(done_bytes, documents, now), file=sys.stderr, flush=True)

    def _text(self, done_bytes: int, documents: int, now: float) -> str:
        seconds = max(now - self._begun, 1e-9)
        left = (self._total - done_bytes) / max(done_bytes / seconds, 1e-9)
        ending = f"  {left:,.0f} s left" if done_bytes and self._bar is None else ""
        counted = f"  {documents:,} documents  {documents / seconds:,.0f} documents/s" if documents else ""
        return (
            f"{done_bytes / self._total:.1%}  {done_bytes / 1e6:,.1f} MB  {done_bytes / 1e6 / seconds:,.1f} MB/s"
            f"{counted}{ending}"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
