"""Compressed files as streams, in bounded memory also for files made to expand; and what a broken one raises."""

from __future__ import annotations

import bz2
import io
import re
import zlib
from collections.abc import Callable
from typing import IO, Any

from engine.errors import UserError

COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
NAMES = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "Zstandard"}
MAGIC = {"gz": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00", "zst": b"\x28\xb5\x2f\xfd"}
"""What a file of each kind begins with. (Zstandard's may also begin with a frame to skip: `packed_by`.)"""
BROKEN = (EOFError, OSError, ValueError)
"""What reading such a stream may raise; `broken` makes words of it."""

_FEED = 1 << 10  # bytes decoded at a time: a kilobyte of gzip can stand for 1 MB, of Zstandard for 32 MB
_MOST = (1 << 20,)  # bytes that bzip2 and xz give at a time, whose kilobyte can stand for a gigabyte
_WINDOW = 1 << 27  # bytes of memory that a stream may ask for, as in the command line tools without --long
_GZIP = 16 + zlib.MAX_WBITS
_UNPACK = "unpack it first:"
_SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # Zstandard's frames without content


def open_stream(raw: IO[bytes], compression: str, path: str) -> IO[bytes]:
    """The bytes in a file opened as `raw`. Raises UserError when a package is missing."""
    return io.BufferedReader(Unpacked(raw, compression, path), 1 << 20) if compression else raw


def packed_by(head: bytes) -> str | None:
    """The kind of compression that a file's first bytes show."""
    if _SKIPPED.match(head):
        return "zst"
    return next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), None)


class TooDemanding(ValueError):
    """A stream is whole, and asks for more memory than one is given."""


def broken(error: Exception, compression: str, size: int | None = None) -> str:
    """One line for an exception of a stream. size: of the file, in bytes."""
    if not compression or (not isinstance(error, (EOFError, ValueError)) and getattr(error, "errno", None)):
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    name = NAMES[compression]
    if isinstance(error, TooDemanding):
        return f"the {name} file {error}"
    if isinstance(error, EOFError):
        has = "" if size is None else f" (the file has {size:,} bytes)"
        return f"the {name} file is cut short: {error}{has}"
    return f"the {name} file is broken: {error}"


class Unpacked(io.RawIOBase):
    """What a packed file holds; several streams (gzip's members, Zstandard's frames) one after another, as one.

    The libraries' own readers are silent about how some files end: zstandard's takes a frame that is cut short for a
    whole one, bz2's drops all that follows a stream and does not begin as one. Here both are errors."""

    def __init__(self, raw: IO[bytes], compression: str, path: str) -> None:
        """Raises UserError when a package is missing."""
        self._raw, self._compression = raw, compression
        self._new, self._error = _decoders(compression, path)
        self._bound = _MOST if compression in ("bz2", "xz") else ()
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
            if self._compression in ("gz", "xz") and self._streams:
                packed = packed.lstrip(b"\0")  # what fills the last block of a tape, and xz up to whole words
            self._packed = b""
            if not packed:
                return b""
            if self._compression == "zst":
                _check_window(packed)
            self._decoder = self._new()
            self._streams += 1
        try:
            out: bytes = self._decoder.decompress(packed, *self._bound)
        except self._error as error:
            if self._compression == "xz" and "limit" in str(error):
                raise TooDemanding(f"asks for more than {_WINDOW >> 20} MiB of memory; {_UNPACK} xz -dk FILE") from None
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
    if compression == "xz":
        try:
            import lzma  # some builds of Python lack it
        except ImportError:
            raise UserError(f"{path} is an xz file, and this Python has no lzma to read it; unpack it first") from None
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW), lzma.LZMAError
    try:
        import zstandard
    except ImportError:
        raise UserError(f'{path} needs the package "zstandard": pip install zstandard') from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(), zstandard.ZstdError


def _check_window(frame: bytes) -> None:
    """Raises TooDemanding for a frame of Zstandard whose window is larger than the memory it may have."""
    import zstandard

    try:
        window = zstandard.get_frame_parameters(frame).window_size
    except zstandard.ZstdError:
        return  # cut within its header, or no frame: decoding says so
    if window > _WINDOW:
        raise TooDemanding(f"was packed with a window of {window / (1 << 20):,.0f} MiB, and more than "
                           f"{_WINDOW >> 20} MiB of memory are not taken for one; {_UNPACK} zstd -d --long=31 FILE")
