"""What a run reads from the files of a corpus while it lasts: pieces of the tokens, entries of the index, and the
certainty that neither file has changed since it was opened.

Nothing is mapped. A page fault can hold the interpreter's lock while the disk works, makes the kernel read around each
place and count up to 2 MB of what it has there as this process's memory, and where a disk fails or a file was cut it
ends the process without a word. A read does none of it.
"""

from __future__ import annotations

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


class ReadFile:
    """A file open for reading by position, from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def fill(self, into: memoryview, start: int) -> None:
        """Reads the bytes from `start` on. Raises UserError where the file ends too early or cannot be read."""
        while len(into):  # a signal or a network file system may end a read early
            try:
                got = os.preadv(self._file, [into], start)
            except OSError as error:
                raise UserError(f"{self.path} cannot be read at byte {start}: {error.strerror}") from error
            if not got:
                size = os.fstat(self._file).st_size
                raise UserError(f"{self.path} has {size} bytes, and bytes {start} to {start + len(into) - 1} are to be "
                                "read: it has been cut short since it was opened")
            into, start = into[got:], start + got

    def read(self, start: int, nbytes: int) -> bytes | bytearray:
        """The same for few bytes."""
        try:
            found = os.pread(self._file, nbytes, start)
        except OSError:
            found = b""  # and once more, to say what is wrong
        if len(found) == nbytes:
            return found
        again = bytearray(nbytes)
        self.fill(memoryview(again), start)
        return again

    def announce(self, pieces: list[tuple[int, int]]) -> None:
        """Tells the system which pieces (start, bytes) will be read: cold ones then come at once, not one by one."""
        if len(pieces) > 1 and hasattr(os, "posix_fadvise"):
            for start, nbytes in pieces:
                os.posix_fadvise(self._file, start, nbytes, os.POSIX_FADV_WILLNEED)


class Tokens:
    """The tokens of a .bin."""

    def __init__(self, file: ReadFile, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens [start, start + length) of each piece [n], one piece after another [sum of lengths].

        Raises UserError where the file ends too early or cannot be read."""
        item = self._dtype.itemsize
        out = np.empty(int(lengths.sum()), self._dtype)
        pieces = list(zip((starts * item).tolist(), (lengths * item).tolist(), strict=True))
        self._file.announce(pieces)
        into, at = out.view(np.uint8).data, 0
        for start, nbytes in pieces:
            self._file.fill(into[at : at + nbytes], start)
            at += nbytes
        return out


class Entries:
    """An ascending array of i64 somewhere in a file, [count]: entries are read as they are looked at."""

    def __init__(self, file: ReadFile, name: str, offset: int, count: int) -> None:
        """name: what an entry is, for errors."""
        self._file, self._name, self._offset, self._count = file, name, offset, count
        self._seen: dict[int, int] = {}  # entries that every search looks at first

    def read(self, first: int, last: int) -> np.ndarray:
        """Entries first .. last - 1, as far as there are any. Raises UserError when they do not ascend."""
        count = max(0, min(last, self._count) - first)
        found = np.frombuffer(self._file.read(self._offset + 8 * first, 8 * count), "<i8")
        backwards = found[1:] < found[:-1]
        if backwards.any():
            n = int(backwards.argmax())
            raise UserError(f"{self._file.path}: {self._name} {first + n + 1} is {found[n + 1]}, and of the one before "
                            f"it {found[n]}; the index is damaged")
        return found

    def lower_bound(self, key: int) -> int:
        """How many entries are below key: by bisection, the last steps of it in one piece of the file."""
        low, high, depth = 0, self._count, 0
        while high - low > _PIECE:
            middle, depth = (low + high) // 2, depth + 1
            value = self._seen.get(middle)
            if value is None:
                value = int.from_bytes(self._file.read(self._offset + 8 * middle, 8), "little", signed=True)
                if depth <= _REMEMBERED:
                    self._seen[middle] = value
            if value < key:
                low = middle + 1
            else:
                high = middle
        return low + int(self.read(low, high).searchsorted(key))

    def run(self, first: int, bound: int) -> np.ndarray:
        """The entries from `first` on up to one that is not below bound."""
        parts, at, size = [], first, _FEW
        while True:
            part = self.read(at, at + size)
            end = int(part.searchsorted(bound))
            parts.append(part[:end])
            at, size = at + end, min(2 * size, _BLOCK)
            if end < len(part) or at >= self._count:
                return np.concatenate(parts) if len(parts) > 1 else part[:end]


_PIECE = 512  # entries: 4 KiB
_REMEMBERED = 12  # steps of a search: 4,095 entries
_FEW, _BLOCK = 32, 1 << 20
