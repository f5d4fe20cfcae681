"""Compressed files as streams, in bounded memory also for files made to expand; and what a broken one raises."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from typing import IO, Any

from engine.errors import UserError

COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".zst": "zst"}
_NAMES = {"gz": "gzip", "bz2": "bzip2", "zst": "Zstandard"}
BROKEN = (EOFError, OSError, zlib.error, ValueError)
"""What reading such a stream may raise; `broken` makes words of it."""


def open_stream(raw: IO[bytes], compression: str, path: str) -> IO[bytes]:
    """The bytes in a file opened as `raw`. Raises UserError when a package is missing."""
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if compression == "bz2":
        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if compression == "zst":
        return io.BufferedReader(_Zstandard(raw, path), 1 << 20)
    return raw


def broken(error: Exception, compression: str) -> str:
    """One line for an exception of a stream."""
    if compression and (isinstance(error, (EOFError, zlib.error, ValueError)) or not getattr(error, "errno", None)):
        return f"the {_NAMES[compression]} file is broken or cut short: {error}"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


class _Zstandard(io.RawIOBase):
    """Frames one after another. The package's own reader takes a file cut short for its end, so frames are followed
    here; a kilobyte at a time, because one of those can stand for 32 MB."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f'{path} needs the package "zstandard": pip install zstandard') from None
        self._zstandard: Any = zstandard
        self._raw, self._out, self._left = raw, memoryview(b""), b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            packed = self._left or self._raw.read(1024)
            self._left = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._out = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        try:
            out = self._frame.decompress(packed)
        except self._zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if self._frame.eof:
            self._left, self._frame = self._frame.unused_data, None
        return out
