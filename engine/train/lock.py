"""The lock of a run folder: two runs in one folder would write each other's files."""

from __future__ import annotations

import fcntl
from pathlib import Path

from engine.errors import UserError


class RunLock:
    """Held by rank 0 as long as the run; the system lets go of it when the process ends, however that happens."""

    def __init__(self, out: Path) -> None:
        """Makes the folder and locks it. Raises UserError where that is impossible or another run holds it."""
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(out / ".lock", "w")  # noqa: SIM115  held as long as the run
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise UserError(f"another run is writing {out}; wait for it, or give another --out") from None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def check_lock(out: Path) -> None:
    """Raises UserError when another run holds the folder; writes nothing."""
    if (out / ".lock").is_file():
        with RunLock(out):
            pass
