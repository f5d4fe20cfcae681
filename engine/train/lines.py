"""The run folder's lines, one object a step (metrics.jsonl, samples.jsonl): damage is cut, and what is lost is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.checkpoint.folders import sync
from engine.errors import UserError, shown
from engine.train.callbacks import StepRecord
from engine.train.lock import still_there


class JsonLines:
    """Appends one object a step to a file of the run folder; on rank 0 only.

    At the start, lines of steps after `step` are cut off, since a resumed run writes them again, and so are damaged
    ones (a power cut leaves zeros or half a line). `note` is then what is missing, in one line, else None.
    """

    def __init__(self, path: Path, step: int, line: Callable[[StepRecord], dict[str, Any]]) -> None:
        """Raises UserError where the file cannot be read or written."""
        self.path, self.line = path, line
        self.note: str | None = None
        try:
            if path.exists():
                self._keep_sound(step)
            elif step:
                self.note = f"{shown(path)} is not there: it begins at step {step + 1}"
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
            sync(path.parent)
        except OSError as error:
            raise self._failure(error) from None

    def _keep_sound(self, step: int) -> None:
        """Leaves the sound lines of steps 1 to `step`, each once and in order."""
        found = list(_read(self.path))
        sound: list[bytes] = []
        missing: list[str] = []
        damaged, done = 0, 0
        following = [*(number for number, _ in found), None][1:] if found else []
        for (number, text), after in zip(found, following, strict=True):
            if number is None or number <= done or (after is not None and after <= number <= step):
                damaged += 1  # no object, or a step number that does not stand between its neighbours
            elif number <= step:
                missing += _span(done + 1, number - 1)
                sound.append(text)
                done = number
        missing += _span(done + 1, step)
        if found and (len(sound) < len(found) or not found[-1][1].endswith(b"\n")):
            fresh = self.path.with_name(f".{self.path.name}.new")
            fresh.write_bytes(b"".join(text.removesuffix(b"\n") + b"\n" for text in sound))
            sync(fresh)
            os.replace(fresh, self.path)  # a crash at this moment loses no line
        if damaged or missing:
            cut = f"{damaged} damaged line{'s' if damaged > 1 else ''} cut; " if damaged else ""
            lacks = f"no line is left of step {shown(', '.join(missing))}" if missing else f"steps 1-{step} are whole"
            self.note = f"{shown(self.path)}: {cut}{lacks}"

    def after_step(self, record: StepRecord, last: bool) -> None:
        try:
            if not still_there(self.file, self.path):
                self._reopen()
            text = memoryview((json.dumps(self.line(record)) + "\n").encode())
            while text:
                text = text[self.file.write(text) :]
        except OSError as error:
            raise self._failure(error) from None

    def sync(self) -> None:
        """Forces the lines to the disk: before a checkpoint, so that none of its steps lacks its line after a power
        cut. Another thread may call it."""
        file = self.file
        try:
            os.fsync(file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def _reopen(self) -> None:
        """Goes on in the file that stands there now: an editor has written it anew, or it was deleted."""
        try:
            file = open(self.path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        except (FileNotFoundError, NotADirectoryError):
            return  # the folder itself is gone, which `WatchFolder` sees
        self.file = file  # the old one closes itself when no thread syncs it any more

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"{shown(self.path)} cannot be written: {error.strerror or error}; when that is mended, go on "
                         "with --resume")


def _read(path: Path) -> Iterator[tuple[int | None, bytes]]:
    """The lines of a file, each with its step; None for what is no object with a step."""
    with open(path, "rb") as file:
        for text in file:
            try:
                step = json.loads(text.decode("utf-8"))["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                step = None
            yield (step if type(step) is int and step > 0 else None), text


def _span(first: int, last: int) -> list[str]:
    """`3-7`, `3`, or nothing."""
    return [] if first > last else [str(first) if first == last else f"{first}-{last}"]
