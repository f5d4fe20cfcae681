"""The lock of a run folder: two runs in one folder would write each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import IO

from engine.checkpoint.folders import LOCK
from engine.errors import BAD_INPUT, UserError, shown
from engine.train.rendezvous import Ended

FACTS = ("config.yaml", "env.json")
LOGS = ("metrics.jsonl", "samples.jsonl")


class RunLock:
    """Held by rank 0 as long as the run; the system lets go of it when the process ends, however that happens. A run
    that ends by a UserError before its first step leaves nothing behind."""

    def __init__(self, out: Path) -> None:
        """Makes the folder and locks it. Raises UserError where that is impossible or another run holds it."""
        self.out = out
        self.made = [path for path in (out, *out.absolute().parents) if not path.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.before = {name: _size(out / name) for name in os.listdir(out)}
            self.file = self._open()
            self.mark = secrets.token_hex(16)
            self.file.truncate(0)
            self.file.write(self.mark)
            self.file.flush()
        except OSError as error:
            self._remove_folders()
            raise UserError(f"--out {shown(out)} cannot be written: {error.strerror}") from None

    def _open(self) -> IO[str]:
        """The lock file, locked. Whoever held it before may have deleted it at this very moment: then it is made
        again, for a lock on a deleted file keeps nobody out."""
        while True:
            file = open(self.out / LOCK, "a", encoding="utf-8")  # noqa: SIM115  held as long as the run
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise UserError(f"another run is writing {shown(self.out)}; wait for it, or give another "
                                "--out") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.out / LOCK)):
                    return file
            file.close()

    def in_place(self) -> bool:
        """Whether the folder is still the one that was locked: not deleted, moved away or replaced."""
        if still_there(self.file, self.out / LOCK):
            return True
        try:  # by content, since some network file systems do not keep a file's number
            return (self.out / LOCK).read_text(encoding="ascii", errors="replace") == self.mark
        except OSError:
            return False

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self.file.truncate(0)
        if isinstance(error, UserError) or (isinstance(error, Ended) and error.code == BAD_INPUT):
            self._sweep()
        self.file.close()

    def _sweep(self) -> None:
        """Removes what this run wrote, unless it has made a step."""
        if any(_size(self.out / name) > self.before.get(name, 0) for name in LOGS):
            return
        for name in (*FACTS, *LOGS, LOCK):
            if name not in self.before:
                with contextlib.suppress(OSError):
                    os.unlink(self.out / name)
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self.made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def still_there(file: IO[str] | IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that stands at its path."""
    try:
        found, held = os.stat(path), os.fstat(file.fileno())
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def check_lock(out: Path) -> None:
    """Raises UserError when another run holds the folder; writes nothing."""
    if (out / LOCK).is_file():
        with RunLock(out):
            pass
