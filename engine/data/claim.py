"""A folder that one run works in at a time, and files brought to the disk."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError


def claim(folder: Path, clear: bool = True) -> IO[bytes]:
    """Creates the folder, or takes over one whose run has died, removing what that left if `clear`; the lock is held
    until the file is closed. Raises UserError when it cannot be written, another run holds it, or it is none of ours,
    which a file "lock" would show."""
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / "lock").exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is where a run does its work, and holds other files, which would be lost; "
                            "move them or choose another output prefix")
        lock = open(folder / "lock", "wb")
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_nlink == 0:
            raise BlockingIOError  # the run that held it has ended since we opened it, and removed the folder
    except OSError as error:
        lock.close()
        raise UserError(f"another run is writing {folder}; wait for it or choose another output prefix") from error
    if clear:
        empty(folder, "lock")
    return lock


def empty(folder: Path, *kept: str) -> None:
    """Removes what a folder holds but for the names in `kept`. Raises OSError."""
    for left in folder.iterdir():
        if left.name not in kept:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def remove(folder: Path) -> None:
    """Removes a folder that `claim` gave; the lock goes last, since without it nobody would know what it is. Raises
    OSError."""
    empty(folder, "lock")
    (folder / "lock").unlink()
    folder.rmdir()


def sync(file: IO[Any]) -> None:
    """Brings what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
