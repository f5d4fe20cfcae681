"""Checksums of a file, block by block: taken as its bytes are written, compared when they are read.

crc32, as in checkpoints: in a block it finds every flipped bit, every run of up to 32 wrong ones, and all but one in
four billion of everything else. It protects from disks and cables, not from a person who means it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError

BLOCK_BYTES = 16 << 20
"""Small enough to say where a file is damaged, large enough that a terabyte needs few sums (65,536)."""
_LARGEST_BLOCK = 1 << 30
_ADVICE = "the file is damaged, or was changed: take a copy of it, or make it again"


@dataclass(frozen=True)
class FileSums:
    """A file's size and the crc32 of each of its blocks; the last may be shorter, and an empty file has none."""

    size: int
    block_bytes: int
    crc32: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """For P.json."""
        return {"bytes": self.size, "block_bytes": self.block_bytes, "crc32": [f"{crc:08x}" for crc in self.crc32]}

    @classmethod
    def from_json(cls, value: Any) -> FileSums:
        """What `as_json` gave. Raises ValueError for anything else."""
        try:
            size, block, sums = value["bytes"], value["block_bytes"], [int(crc, 16) for crc in value["crc32"]]
        except (TypeError, KeyError, ValueError):
            raise ValueError('"files" holds no checksums that can be read') from None
        # A block holds whole tokens, whatever their dtype: so a block's ids can be looked at by themselves.
        whole = type(size) is int and type(block) is int and size >= 0 and 0 < block <= _LARGEST_BLOCK and not block % 8
        if not whole or len(sums) != -(-size // block):
            raise ValueError(f'"files" holds {len(sums)} checksums, not those of a file of so many bytes')
        return cls(size, block, tuple(sums))

    def check_size(self, path: Path) -> None:
        """Raises UserError unless the file has the size it was written with."""
        found = path.stat().st_size
        if found != self.size:
            raise UserError(f"{path} has {found:,} bytes and was written with {self.size:,}; {_ADVICE}")

    def check_block(self, path: Path, number: int, crc: int) -> None:
        """Raises UserError unless block `number` of the file has the checksum it was written with."""
        if crc != self.crc32[number]:
            first = number * self.block_bytes
            last = min(first + self.block_bytes, self.size) - 1
            raise UserError(f"{path}: bytes {first:,} to {last:,} do not match their checksum (crc32 {crc:08x}, "
                            f"written {self.crc32[number]:08x}); {_ADVICE}")

    def check_same(self, path: Path, found: FileSums) -> None:
        """Raises UserError unless the file's bytes, summed while they were read, are those that were written."""
        if found.size != self.size:
            raise UserError(f"{path}: {found.size:,} bytes were read and {self.size:,} written; {_ADVICE}")
        for number, crc in enumerate(found.crc32):
            self.check_block(path, number, crc)

    def read(self, path: Path) -> Iterator[bytes]:
        """The file's blocks, each compared with its checksum before it is given. Raises UserError."""
        self.check_size(path)
        try:
            with open(path, "rb", buffering=0) as file:
                for number in range(len(self.crc32)):
                    block = _read_whole(file, min(self.block_bytes, self.size - number * self.block_bytes))
                    self.check_block(path, number, zlib.crc32(block))
                    yield block
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


class Summing:
    """The checksums of bytes that go by in order."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes, self._size, self._crc = block_bytes, 0, 0
        self._sums: list[int] = []

    def update(self, data: memoryview | bytes) -> None:
        """Takes in the bytes that follow."""
        view = memoryview(data)
        if not view.nbytes:
            return  # what has no bytes cannot be cast
        view = view.cast("B")
        while view:
            part = view[: self._block_bytes - self._size % self._block_bytes]
            self._crc = zlib.crc32(part, self._crc)
            self._size += len(part)
            if self._size % self._block_bytes == 0:
                self._sums.append(self._crc)
                self._crc = 0
            view = view[len(part) :]

    def sums(self) -> FileSums:
        """The sums of all bytes so far."""
        last = (self._crc,) if self._size % self._block_bytes else ()
        return FileSums(self._size, self._block_bytes, (*self._sums, *last))


def sum_of_json(body: Mapping[str, Any]) -> str:
    """crc32, hex, of a JSON object in one canonical spelling."""
    return f"{zlib.crc32(json.dumps(body, separators=(',', ':'), sort_keys=True).encode('ascii')):08x}"


def _read_whole(file: Any, size: int) -> bytes:
    """`size` bytes, fewer only at the file's end: a signal or a network file system may end a read early."""
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
