"""Compressed files as streams, in bounded memory also for files made to expand; and what a broken one raises."""

from __future__ import annotations

import bz2
import io
import zlib
from collections.abc import Callable
from typing import IO, Any

from engine.errors import UserError

COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".zst": "zst"}
_NAMES = {"gz": "gzip", "bz2": "bzip2", "zst": "Zstandard"}
BROKEN = (EOFError, OSError, ValueError)
"""What reading such a stream may raise; `broken` makes words of it."""

_FEED = 1 << 10  # bytes decoded at a time: a kilobyte of gzip can stand for 1 MB, of Zstandard for 32 MB
_MOST = (1 << 20,)  # bytes that bzip2 gives at a time, whose kilobyte can stand for a gigabyte
_GZIP = 16 + zlib.MAX_WBITS


def open_stream(raw: IO[bytes], compression: str, path: str) -> IO[bytes]:
    """The bytes in a file opened as `raw`. Raises UserError when a package is missing."""
    return io.BufferedReader(Unpacked(raw, compression, path), 1 << 20) if compression else raw


def broken(error: Exception, compression: str) -> str:
    """One line for an exception of a stream."""
    if compression and (isinstance(error, (EOFError, ValueError)) or not getattr(error, "errno", None)):
        return f"the {_NAMES[compression]} file is broken or cut short: {error}"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


class Unpacked(io.RawIOBase):
    """What a packed file holds; several streams (gzip's members, Zstandard's frames) one after another, as one.

    The libraries' own readers are silent about how some files end: zstandard's takes a frame that is cut short for a
    whole one, bz2's drops all that follows a stream and does not begin as one. Here both are errors."""

    def __init__(self, raw: IO[bytes], compression: str, path: str) -> None:
        """Raises UserError when a package is missing."""
        self._raw, self._is_gzip = raw, compression == "gz"
        self._new, self._error = _decoders(compression, path)
        self._bound = _MOST if compression == "bz2" else ()
        self._decoder: Any = None
        self._streams, self._is_hungry = 0, True
        self._packed, self._out = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises BROKEN."""
        while not self._out:
            packed = self._packed or (self._raw.read(_FEED) if self._is_hungry else b"")
            if not packed and self._is_hungry:
                if self._decoder is not None or not self._streams:
                    raise EOFError("it ends within a stream" if self._streams else "it is empty")
                return 0
            self._out = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        if self._decoder is None:
            if self._is_gzip and self._streams:
                packed = packed.lstrip(b"\0")  # what fills the last block of a tape
            self._packed = b""
            if not packed:
                return b""
            self._decoder = self._new()
            self._streams += 1
        try:
            out: bytes = self._decoder.decompress(packed, *self._bound)
        except self._error as error:
            raise ValueError(str(error)) from None
        self._packed = self._decoder.unused_data
        self._is_hungry = self._decoder.eof or getattr(self._decoder, "needs_input", True)
        if self._decoder.eof:
            self._decoder = None
        return out


def _decoders(compression: str, path: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decoder of one stream, and what that raises."""
    if compression == "gz":
        return lambda: zlib.decompressobj(_GZIP), zlib.error
    if compression == "bz2":
        return bz2.BZ2Decompressor, OSError
    try:
        import zstandard
    except ImportError:
        raise UserError(f'{path} needs the package "zstandard": pip install zstandard') from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(), zstandard.ZstdError
