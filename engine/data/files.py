"""What a run reads from the files of a corpus while it lasts: pieces of the tokens, entries of the index, and the
certainty that neither file has changed since it was opened."""

from __future__ import annotations

import mmap
import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError


class Watched:
    """A file as it was when this was made: its size and the time of its last change.

    Its inode is not compared: some network file systems give a file another one while nothing has changed, and a file
    that takes another's place brings its own time of change along."""

    def __init__(self, path: Path) -> None:
        self.path, self._then = path, os.stat(path)

    def check(self) -> None:
        """Raises UserError, saying what has changed, unless the file is what it was. Costs one stat."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path} has gone since it was opened ({error.strerror}); {_ADVICE}") from None
        if now.st_size != self._then.st_size:
            raise UserError(f"{self.path} has changed since it was opened: it had {self._then.st_size} bytes and has "
                            f"{now.st_size} now; {_ADVICE}")
        if now.st_mtime_ns != self._then.st_mtime_ns:
            raise UserError(f"{self.path} has changed since it was opened: it was last written at "
                            f"{_clock(self._then.st_mtime_ns)} and is now of {_clock(now.st_mtime_ns)}; {_ADVICE}")


_ADVICE = "put the file back and go on with --resume, or start another run on the new one"


def _clock(nanoseconds: int) -> str:
    seconds, fraction = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{fraction:09d}"


class TokenFile:
    """Reads pieces of a .bin by position, without mapping it.

    A page fault on a mapping holds the interpreter's lock where a copy is short, makes the kernel read ahead around
    each place, and on a disk that fails or a file that was cut ends the process without a word; a read does none of it.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens [start, start + length) of each piece [n], one piece after another [sum of lengths].

        Raises UserError where the file ends too early or cannot be read."""
        item = self.dtype.itemsize
        out = np.empty(int(lengths.sum()), self.dtype)
        pieces = list(zip((starts * item).tolist(), (lengths * item).tolist(), strict=True))
        if len(pieces) > 1 and hasattr(os, "posix_fadvise"):  # cold pieces then come at once, not one after another
            for start, nbytes in pieces:
                os.posix_fadvise(self._file, start, nbytes, os.POSIX_FADV_WILLNEED)
        into, at = out.view(np.uint8).data, 0
        for start, nbytes in pieces:
            self._fill(into[at : at + nbytes], start)
            at += nbytes
        return out

    def _fill(self, into: memoryview, start: int) -> None:
        while len(into):  # a signal or a network file system may end a read early
            try:
                got = os.preadv(self._file, [into], start)
            except OSError as error:
                raise UserError(f"{self.path} cannot be read at byte {start}: {error.strerror}") from error
            if not got:
                raise UserError(f"{self.path} ends at byte {start}, {len(into)} bytes before the end of a sample that "
                                "its index promises; it has been cut short")
            into, start = into[got:], start + got


def map_random(path: Path) -> mmap.mmap:
    """Maps a file, not empty, whose entries are looked up here and there: the kernel reads nothing around them."""
    with open(path, "rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        found.madvise(mmap.MADV_RANDOM)
    return found


def lower_bound(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """How many of the ascending values [m] are below each key: int64 [n] -> int64 [n].

    np.searchsorted for entries in a file: that one first copies all values when they are not aligned in memory, and an
    index' header of 34 bytes sees to it that they never are. This looks at log2(m) entries a key."""
    found = np.zeros(len(keys), np.int64)
    for bit in reversed(range(len(values).bit_length())):
        probe = np.minimum(found + (1 << bit), len(values))
        found = np.where(values[probe - 1] < keys, probe, found)
    return found
