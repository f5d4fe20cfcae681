"""Equal keys of more documents than fit in memory, found by sorting on disk.

add() appends each band's keys to a file of its own: the document's id is the place in it. finish() takes the bands one
after the other. Blocks that fit in memory are sorted; equal neighbours are duplicates, and the first of each run goes
on to the partition that its key's leading bits name; then the partitions are sorted. A key shared by everything leaves
one record a block behind, so no partition outgrows memory. Names in the folder are fixed: a run that was killed is
started again over its own remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from engine.data.dedup.groups import FACTS, Dropped, Groups
from engine.errors import UserError

MEMORY = 256 << 20
_BYTES_A_RECORD = 128  # key, id, order and the copies that sorting and joining make of them: measured, at most 120
_FEWEST = 1 << 10


class Method(Protocol):
    """What makes two documents duplicates: agreement in the key of any band."""

    @property
    def bands(self) -> int:
        """Keys of a document."""
        ...

    @property
    def words(self) -> int:
        """64-bit words of a key."""
        ...


class Deduplicator:
    """Takes all documents' signatures in order and says which documents are duplicates of an earlier one.

    Duplicates are transitive: a, b and c are one group where a is a duplicate of b and b of c. Memory does not grow
    with the number of documents beyond memory-mapped pages that the system may evict; on disk a document takes
    8 bands x words bytes, 8 more at the end, and 8 (words + 1) while its band is partitioned."""

    def __init__(self, folder: str | Path, method: Method, memory: int = MEMORY) -> None:
        """memory: bytes that sorting may use. Makes the folder, and writes over what an earlier run left in it."""
        self.folder, self.method = Path(folder), method
        self.block = max(memory // (_BYTES_A_RECORD + 16 * method.words), _FEWEST)
        self.documents = 0
        self._files = ExitStack()
        with self._named():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in [self.folder / FACTS, *self.folder.glob("part-*.u64"), *self.folder.glob("band-*.u64")]:
                left.unlink(missing_ok=True)
            self._columns = [self._files.enter_context(open(path, "wb", 1 << 16)) for path in self._paths()]

    def __enter__(self) -> Deduplicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.close()

    def add(self, first_id: int, signatures: np.ndarray) -> None:
        """The signatures, uint64 [documents, bands x words], of documents first_id, first_id + 1 and so on; ids follow
        each other without a gap, from 0. Raises UserError when the disk is full."""
        if first_id != self.documents:
            raise ValueError(f"document {first_id} follows {self.documents - 1}: ids are consecutive")
        words = self.method.words
        if signatures.dtype != np.uint64 or signatures.shape[1:] != (self.method.bands * words,):
            raise ValueError(f"signatures are {signatures.dtype} {signatures.shape}")
        with self._named():
            for band, file in enumerate(self._columns):
                file.write(signatures[:, band * words : (band + 1) * words].astype("<u8").tobytes())
        self.documents += len(signatures)

    def finish(self) -> Dropped:
        """Which documents to leave out. Raises UserError when the disk is full."""
        with self._named():
            self._files.close()
            groups = Groups(self.folder, self.documents)
            for path in self._paths():
                self._join_equal(path, groups)
                path.unlink()
            return groups.finish()

    def _paths(self) -> list[Path]:
        return [self.folder / f"band-{band:04d}.u64" for band in range(self.method.bands)]

    def _join_equal(self, column: Path, groups: Groups) -> None:
        """Joins the documents of one band that have the same key."""
        parts = _partitions(self.documents, self.block)
        for keys, ids in self._blocks(column):
            keys, ids = _join_runs(keys, ids, groups)
            if parts > 1:
                self._spill(keys, ids, parts)
        for part in range(parts if parts > 1 else 0):
            path = self._part(part)
            if path.exists():
                records = np.fromfile(path, "<u8").reshape(-1, self.method.words + 1)
                _join_runs(records[:, :-1], records[:, -1].astype(np.int64), groups)
                path.unlink()

    def _blocks(self, column: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys, uint64 [documents, words], and ids, int64, in blocks that may be sorted in memory."""
        words = self.method.words
        with open(column, "rb") as file:
            for at in range(0, self.documents, self.block):
                count = min(self.block, self.documents - at)
                keys = np.fromfile(file, "<u8", count * words).reshape(count, words)
                yield keys, np.arange(at, at + count)

    def _spill(self, keys: np.ndarray, ids: np.ndarray, parts: int) -> None:
        """Appends sorted records to their partitions. Files are opened for each block: they may be thousands."""
        edges = np.arange(parts, dtype=np.uint64) << np.uint64(64 - (parts - 1).bit_length())
        bounds = [*np.searchsorted(keys[:, 0], edges), len(keys)]
        records = np.column_stack([keys, ids.astype(np.uint64)]).astype("<u8")
        for part in range(parts):
            if bounds[part] < bounds[part + 1]:
                with open(self._part(part), "ab") as file:
                    file.write(records[bounds[part] : bounds[part + 1]].tobytes())

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.u64"

    def _named(self) -> _Named:
        return _Named(self.folder)


class _Named:
    """Turns an error of the disk into one line that names the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"cannot keep the deduplication's working files in {self.folder}: {error.strerror or error}; "
                "it needs about 8 bytes a document and band"
            ) from None


def _partitions(documents: int, block: int) -> int:
    """A power of two of partitions that leaves each half empty on average, so that chance cannot overfill one."""
    return 1 if documents <= block else 1 << (2 * documents // block).bit_length()


def _join_runs(keys: np.ndarray, ids: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Joins documents of equal keys; what is left is each key once, sorted, with the lowest id that has it."""
    if not len(ids):
        return keys, ids
    # One word sorts by a faster, unstable sort; that is why the lowest id of a run is looked for.
    order = np.argsort(keys[:, 0]) if keys.shape[1] == 1 else np.lexsort(keys.T[::-1])
    keys, ids = keys[order], ids[order]
    begins = np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])
    starts = np.flatnonzero(begins)
    lowest = np.minimum.reduceat(ids, starts)
    keepers = lowest[np.cumsum(begins) - 1]
    others = ids != keepers
    groups.join(keepers[others], ids[others])
    return keys[starts], lowest
