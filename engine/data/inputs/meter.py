"""A file that is measured as it is read: what a span's bytes hash to, how many lines end in it, how far reading is."""

from __future__ import annotations

import hashlib
import io
from typing import Any

BLOCK_BYTES = 2 << 20


class Meter(io.RawIOBase):
    """The file at `path` from byte `begin`, to be read in sequence. Bytes [start, stop) are hashed in blocks of
    `block_bytes`, so that spans of a file, read by different processes, give together what one reader would.

    blocks: sha256 (hex) of each block, complete after `drain`; newlines: in [start, stop), as far as read."""

    def __init__(self, path: str, start: int, stop: int, *, begin: int | None = None,
                 block_bytes: int = BLOCK_BYTES) -> None:
        """Raises OSError."""
        self.start, self.stop, self.position = start, stop, start if begin is None else begin
        self.blocks: list[str] = []
        self.newlines = 0
        self._block_bytes, self._hash, self._hashed = block_bytes, hashlib.sha256(), 0
        self._file = open(path, "rb", buffering=0)
        self._file.seek(self.position)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        view = memoryview(buffer)[:count]
        self._measure(view[max(0, self.start - self.position) : max(0, self.stop - self.position)])
        self.position += count
        return count

    def _measure(self, view: memoryview) -> None:
        while view:
            part = view[: self._block_bytes - self._hashed]
            self._hash.update(part)
            self._hashed += len(part)
            self.newlines += bytes(part).count(b"\n")
            if self._hashed == self._block_bytes:
                self._end_block()
            view = view[len(part) :]

    def _end_block(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash, self._hashed = hashlib.sha256(), 0

    def drain(self) -> None:
        """Reads what is left of the span: after a fault, the rest still belongs to the hash. Raises OSError."""
        buffer = bytearray(1 << 20)
        while self.position < self.stop and self.readinto(buffer):
            pass
        if self._hashed or not self.blocks:
            self._end_block()

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


def newlines_before(path: str, stop: int) -> int:
    """The line ends in a file's first `stop` bytes: read only to name a fault's line."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(1 << 20, stop))):
            count += block.count(b"\n")
            stop -= len(block)
    return count
