"""Byte ranges of a compressed or plain file, so that several workers can share one dump.

A bz2 file may hold many streams one after another (a multistream dump has one for every 100 pages; parallel compressors
make one for every 900 kB). A stream belongs to the range in which its first byte lies. A range's reader goes on beyond
its end on demand, so that a page which begins in the range can be finished.

Format of bz2: "BZh", a digit, then the magic of a block, 48 bits; https://en.wikipedia.org/wiki/Bzip2#File_format.
"""

from __future__ import annotations

import bz2
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn, Protocol

from engine.data.encoding import decoder
from engine.data.unpack import BROKEN, Unpacked, broken, packed_by
from engine.errors import UserError

_STREAM = re.compile(rb"BZh[1-9]1AY&SY")
_MAGIC = 10  # bytes that _STREAM matches
_FEED = 16 << 10  # bytes given to a decoder at once: what is left of them at a stream's end is copied
_BLOCK = 1 << 20


class BrokenStream(Exception):
    """Compressed data that cannot be read on; the reader has moved to the next stream, if there is one."""

    def __init__(self, message: str, stream: int, own: bool) -> None:
        super().__init__(message)
        self.stream, self.own = stream, own
        """File offset of the stream, and whether this range's reader is the one to report it."""


class RangeReader(Protocol):
    """The decompressed bytes of a range, and after them those that follow it in the file."""

    past_end: bool
    """Whether the bytes last read lie beyond the range. No read returns bytes of both sides."""
    stream: int
    """File offset of the stream that the bytes last read came from; 0 in a file without streams."""
    skipped: int
    """Decompressed bytes of that stream before the first byte read: where a plain file's range starts."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, b"" only at the file's end. Raises BrokenStream; reading may go on after it."""

    def close(self) -> None:
        """Closes the file."""


def read_range(
    path: str | Path, start: int = 0, stop: int | None = None, encoding: str = "utf-8"
) -> RangeReader:
    """Opens bytes [start, stop) of a file (None: to its end), decompressed by what the file holds: bz2 by streams,
    plain by bytes; gzip, xz and zstd cannot be entered in the middle: such a file belongs to the range with byte 0.
    So does one of another encoding than UTF-8, which is given as UTF-8 (`engine.data.encoding.AsUtf8`).

    Raises UserError when the file cannot be opened."""
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    stop = size if stop is None else min(stop, size)
    kind, is_whole = packed_by(magic), start <= 0 < stop
    if encoding != "utf-8":
        return _Decoded(read_range(path, 0 if is_whole else size), encoding)
    if kind == "bz2":
        return _Bz2Range(path, start, stop)
    return _PlainRange(path, start, stop) if kind is None else _WholeRange(path, kind, not is_whole)


class _PlainRange:
    """A range of an uncompressed file."""

    def __init__(self, path: str | Path, start: int, stop: int) -> None:
        self._file = open(path, "rb")
        self._file.seek(start)
        self._left = max(0, stop - start)
        self.past_end, self.stream, self.skipped = False, 0, start

    def read(self, size: int, /) -> bytes:
        self.past_end = self._left == 0
        data = self._file.read(size if self.past_end else min(size, self._left))
        self._left = max(0, self._left - len(data))
        return data

    def close(self) -> None:
        self._file.close()


class _WholeRange:
    """A compressed file that is read from its beginning or not at all."""

    def __init__(self, path: str | Path, compression: str, empty: bool) -> None:
        self._file, self._ended, self._compression = open(path, "rb"), empty, compression
        self._unpacked = Unpacked(self._file, compression, str(path))
        self.past_end, self.stream, self.skipped = empty, 0, 0

    def read(self, size: int, /) -> bytes:
        try:
            return b"" if self._ended else self._unpacked.read(size) or b""
        except BROKEN as error:
            self._ended = True  # there is no place to go on from
            size = os.fstat(self._file.fileno()).st_size
            raise BrokenStream(broken(error, self._compression, size), 0, True) from None

    def close(self) -> None:
        self._file.close()


class _Decoded:
    """A whole file as UTF-8. After a broken stream there is nothing: where a character begins is not known there."""

    def __init__(self, inner: RangeReader, encoding: str) -> None:
        self._inner, self._decoder, self._ended = inner, decoder(encoding), False
        self.past_end, self.stream, self.skipped = False, 0, 0

    def read(self, size: int, /) -> bytes:
        while not self._ended:
            try:
                data = self._inner.read(size)
            except BrokenStream as fault:
                self._ended = True
                raise BrokenStream(str(fault), fault.stream, True) from None
            self._ended = not data
            text = self._decoder.decode(data, self._ended)
            if text:
                return text.encode("utf-8", "surrogatepass")
        return b""

    def close(self) -> None:
        self._inner.close()


class _Bz2Range:
    """The streams of a bz2 file that begin in [start, stop), one after another, then those beyond."""

    def __init__(self, path: str | Path, start: int, stop: int) -> None:
        self._file = open(path, "rb", buffering=_BLOCK)
        self._stop = stop
        self._decoder: bz2.BZ2Decompressor | None = None
        self.past_end, self.stream, self.skipped = False, 0, 0
        self._enter(next(_candidates(self._file, start, stop), None))

    def _enter(self, offset: int | None) -> None:
        """Begins the stream at a file offset; None: there is no other."""
        self._decoder = None
        if offset is not None:
            # Fed from its first byte on in equal parts: what a broken one yields must not depend on what went before.
            self._file.seek(offset)
            self._decoder = bz2.BZ2Decompressor()
            self.stream, self.past_end = offset, offset >= self._stop

    def read(self, size: int, /) -> bytes:
        while self._decoder is not None:
            if self._decoder.eof:
                self._next(self._decoder)
                continue
            data = self._file.read(_FEED) if self._decoder.needs_input else b""
            if not data and self._decoder.needs_input:
                size = os.fstat(self._file.fileno()).st_size
                self._fail(self.stream, f"is cut short: the file has {size:,} bytes")
            try:
                out = self._decoder.decompress(data, size)
            except OSError:
                self._fail(self.stream, "is broken")
            if out:
                return out
        return b""

    def _next(self, ended: bz2.BZ2Decompressor) -> None:
        """Goes to the stream that follows the one just ended."""
        offset = self._file.tell() - len(ended.unused_data)
        self._file.seek(offset)
        begins = self._file.read(3)
        if begins and begins != b"BZh":
            self._fail(offset, "does not begin as one")
        self._enter(offset if begins else None)

    def _fail(self, offset: int, what: str) -> NoReturn:
        own = not self.past_end
        self._enter(next(_candidates(self._file, offset + 1, None), None))
        raise BrokenStream(f"the bz2 stream at byte {offset:,} of the file {what}", offset, own)

    def close(self) -> None:
        self._file.close()


def _candidates(file: IO[bytes], start: int, stop: int | None) -> Iterator[int]:
    """Offsets from `start`, and before `stop`, of the ten bytes that begin a bz2 stream which is not empty."""
    file.seek(start)
    held, base = b"", start
    while stop is None or base < stop:
        data = file.read(_BLOCK)
        if not data:
            return
        held += data
        for match in _STREAM.finditer(held):
            if stop is not None and base + match.start() >= stop:
                return
            yield base + match.start()
        base += max(0, len(held) - _MAGIC + 1)
        held = held[-_MAGIC + 1 :]


def bz2_streams(path: str | Path) -> list[int]:
    """The byte offsets of a bz2 file's streams that hold data, in order. Each is a real one: its first block decodes;
    else the ten bytes there are chance. (This reads the whole file; `read_range` finds its streams by itself.)

    Raises UserError when the file cannot be opened."""
    try:
        with open(path, "rb", buffering=_BLOCK) as file, open(path, "rb") as probe:
            return [offset for offset in _candidates(file, 0, None) if _decodes(probe, offset)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decodes(file: IO[bytes], offset: int) -> bool:
    """Whether the first block at an offset yields a byte; bzip2 must undo a whole block for that."""
    decoder = bz2.BZ2Decompressor()
    file.seek(offset)
    try:
        while not decoder.eof and (data := file.read(_FEED)):
            if decoder.decompress(data, 1):
                return True
    except OSError:
        pass
    return False
