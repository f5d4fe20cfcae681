"""One safetensors file: a strict reader over a memory map, and a writer that streams and takes checksums on the way.

Format (huggingface/safetensors): u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, raw bytes.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.dtypes import CODE_BYTES, CODES, code_dtype, dtype_name
from engine.checkpoint.strict_json import parse_object
from engine.errors import UserError, shown
from engine.signature import first_bytes, refuse_pointer, what_it_is

MAX_HEADER = 100 << 20
"""Bytes of the longest header; the safetensors library has the same limit."""
DIMS = 8
"""The most dims of a tensor; the product of a million sizes would take minutes."""
ALIGNMENT = 8
"""The data section begins at a multiple of this."""
INLINE = 1 << 20
"""Tensors of fewer bytes are summed in line: a thread would cost more than it gains."""
WRITE = 64 << 20
"""Bytes handed to the kernel at a time, and to the disk."""
READ = 512 << 10
"""Bytes read and summed at a time: half of a core's cache."""
BEHIND = 128 << 20
"""Bytes of values that may be written and not yet summed."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its safetensors dtype code, shape, and its bytes [begin, end) of the whole file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Block:
    """A tensor to be written: what the header says of it now, its values when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file, its header checked, its tensors views of a private memory map (copy on write)."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for every way in which the header can be wrong."""
        self.path = path
        try:
            refuse_pointer(path)
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.tensors = _read_header(file, size, path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def raw(self, key: str) -> memoryview:
        """The bytes of a tensor."""
        stored = self.tensors[key]
        return memoryview(self._map)[stored.begin : stored.end]

    def read_into(self, key: str, target: memoryview) -> int:
        """Reads a tensor's bytes into memory of its size; returns their crc32. The sum is taken of each piece while the
        processor's cache holds it. Raises UserError where the file cannot be read."""
        left, crc = target, 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.tensors[key].begin)
                while left:
                    count = file.readinto(left[:READ])
                    if not count:
                        raise UserError(f"{self.path} was cut short while it was read")
                    crc = zlib.crc32(left[:count], crc)
                    left = left[count:]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        return crc

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor as a view of the file's map; a copy only where its bytes are not aligned."""
        stored = self.tensors[key]
        dtype = code_dtype(stored.code, f"{self.path}: {key}")
        if stored.begin == stored.end:
            return torch.empty(stored.shape, dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=stored.end - stored.begin, offset=stored.begin)
        if stored.begin % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)


def _read_header(file: io.BufferedReader, size: int, path: Path) -> dict[str, Stored]:
    length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
    if size < 8 + length or length < 2 or length > MAX_HEADER:
        if (words := what_it_is(first_bytes(path))) is not None:
            raise UserError(f"{path} is no safetensors file: it is {words} ({size:,} bytes)")
        raise UserError(f"{path} is not a whole safetensors file: {size} bytes, and a header of {length}")
    header = parse_object(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"the header of {path} has a __metadata__ that is not text")
    data = 8 + length
    found = {name: _stored(entry, data, path, name) for name, entry in header.items()}
    expected = data
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != expected:
            word = "overlaps the tensor before it" if stored.begin < expected else "leaves a hole before it"
            raise UserError(f"{shown(path)}: '{shown(name)}' {word}")
        expected = stored.end
    if expected != size:
        what = "cut short" if size < expected else "damaged, or something was added to it"
        raise UserError(f"{path} has {size} bytes, but its header accounts for {expected}; it is {what}")
    return found


def _stored(entry: Any, data: int, path: Path, name: str) -> Stored:
    """One entry of a header, checked by itself."""
    def what() -> str:
        return f"{shown(path)}: '{shown(name)}'"

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{what()} must have dtype, shape and data_offsets in the header")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in CODE_BYTES:
        raise UserError(f"{what()} has the unknown dtype '{shown(code)}'")
    if isinstance(shape, list) and len(shape) > DIMS:
        raise UserError(f"{what()} has {len(shape):,} dims; tensors of at most {DIMS} are read")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{what()} has shape {shown(shape)} and data_offsets {shown(offsets)}, which are not sizes")
    if offsets[1] - offsets[0] != math.prod(shape) * CODE_BYTES[code]:
        raise UserError(f"{what()} has {shown(offsets[1] - offsets[0], 40)} bytes, but shape {shown(shape)} of {code} "
                        f"needs {shown(math.prod(shape) * CODE_BYTES[code], 40)}")
    return Stored(code, tuple(shape), data + offsets[0], data + offsets[1])


def _naturals(values: Any) -> bool:
    """Whether `values` is a list of whole numbers, none negative or beyond any file."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def write_tensors(path: Path, blocks: Sequence[Block], metadata: Mapping[str, str] | None = None) -> dict[str, int]:
    """Writes a new file, block after block, and fsyncs it; returns the crc32 of each block's bytes.

    The checksums run in a thread beside the writes, and on beside the fsync (all three leave the interpreter); the disk
    is set to work every WRITE bytes instead of at the end. Besides the block being written, at most BEHIND bytes of
    values are held, still to be summed. Raises FileExistsError, other OSErrors, UserError for two blocks of one key.
    """
    # Wide formats first, as the format asks: then every tensor is aligned without holes.
    ordered = sorted(blocks, key=lambda block: -block.dtype.itemsize)
    sums: dict[str, int] = {}
    running: deque[tuple[str, int, Future[int]]] = deque()
    waiting = 0
    with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1) as summing, ThreadPoolExecutor(1) as disk:
        push = _Pusher(file.fileno(), disk)
        _write(file, memoryview(_header(ordered, metadata or {}, path)), push)
        for block in ordered:
            data = _values(block)
            if len(data) < INLINE:
                sums[block.key] = zlib.crc32(data)
            else:
                running.append((block.key, len(data), summing.submit(zlib.crc32, data)))
                waiting += len(data)
            _write(file, data, push)
            while waiting > BEHIND:
                key, size, done = running.popleft()
                sums[key] = done.result()
                waiting -= size
        push.finish()
        os.fsync(file.fileno())
        sums |= {key: done.result() for key, _, done in running}
    return sums


def _header(blocks: Sequence[Block], metadata: Mapping[str, str], path: Path) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for block in blocks:
        if block.key in header:
            raise UserError(f"{path}: two tensors are called {block.key}")
        header[block.key] = {"dtype": CODES[dtype_name(block.dtype)], "shape": list(block.shape),
                             "data_offsets": [begin, begin + block.bytes]}
        begin += block.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _values(block: Block) -> memoryview:
    """The block's bytes, in host memory."""
    tensor = block.read()
    if tensor.dtype != block.dtype or tuple(tensor.shape) != block.shape:
        raise UserError(f"{block.key} was announced as {block.dtype} {list(block.shape)} and came as {tensor.dtype} "
                        f"{list(tensor.shape)}")
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class _Pusher:
    """Sets the disk to work while more is written; otherwise all of a file waits for the fsync at its end."""

    def __init__(self, handle: int, pool: ThreadPoolExecutor) -> None:
        self.handle, self.pool = handle, pool
        self.last: Future[None] | None = None
        self.fresh = 0

    def wrote(self, count: int) -> None:
        """Counts bytes, and starts the disk on them when they are many and it has done with those before."""
        self.fresh += count
        if self.fresh >= WRITE and (self.last is None or self.last.done()):
            self.finish()
            self.last = self.pool.submit(getattr(os, "fdatasync", os.fsync), self.handle)  # macOS has fsync only
            self.fresh = 0

    def finish(self) -> None:
        """Waits for the disk; raises what it failed with (the system says so only once)."""
        if self.last is not None:
            self.last.result()


def _write(file: io.FileIO, data: memoryview, push: _Pusher) -> None:
    """Writes all of `data`; the kernel may take less than it was given."""
    done = 0
    while done < len(data):
        count = file.write(data[done : done + WRITE]) or 0
        push.wrote(count)
        done += count
