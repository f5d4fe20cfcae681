"""Which documents belong together: union-find in an array on disk, worked on by whole arrays of pairs.

Entry d of the array is 0 where document d has no duplicate, else 1 + the document it hangs under. That one never has a
higher id, so the root of a group, which hangs under itself, is its lowest id whatever order the pairs came in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

FACTS = "groups.json"
"""Exists where a result is complete."""

_ARRAY = "groups.u64"
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Dropped:
    """What deduplication leaves out: of each group of duplicates all but the lowest id. Safe to send to a process: it
    carries the folder, not the array, which is memory-mapped where it is used (8 bytes a document)."""

    folder: Path
    documents: int
    """Documents that were looked at; ids run from 0 to one below."""
    dropped: int
    groups: int
    """Groups of two or more duplicates, each of which leaves one."""

    @classmethod
    def load(cls, folder: Path) -> Dropped | None:
        """What an earlier, finished run left in the folder; None where there is no such run."""
        try:
            return cls(folder, **json.loads((folder / FACTS).read_text()))
        except FileNotFoundError:
            return None

    @cached_property
    def _above(self) -> np.ndarray:
        return _map(self.folder / _ARRAY, self.documents, "r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_above"}

    def is_dropped(self, ids: np.ndarray) -> np.ndarray:
        """Whether each document goes, bool, in the shape of ids."""
        above = self._above[ids]
        return (above != 0) & (above != np.asarray(ids).astype(np.uint64) + np.uint64(1))

    def keeper(self, document: int) -> int:
        """The document that stays in this one's stead: itself, unless it is dropped."""
        return int(self._above[document]) - 1 if self._above[document] else document

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(dropped, keeper) in the order of the dropped ids."""
        for at in range(0, self.documents, _BLOCK):
            ids = np.arange(at, min(at + _BLOCK, self.documents))
            for document in ids[self.is_dropped(ids)]:
                yield int(document), self.keeper(int(document))


class Groups:
    """Takes pairs of duplicates and makes groups of them, transitively, in a file of 8 bytes a document."""

    def __init__(self, folder: Path, documents: int) -> None:
        """Makes the array; raises OSError when the disk is too full for it."""
        self.folder, self.documents = folder, documents
        with open(folder / _ARRAY, "wb") as file:
            file.truncate(8 * documents)
            if documents and hasattr(os, "posix_fallocate"):
                # A write through a memory map to a full disk is a bus error, no exception: take the room now.
                os.posix_fallocate(file.fileno(), 0, 8 * documents)
        self._above = _map(folder / _ARRAY, documents, "r+")

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Each document of `one` is a duplicate of the one beside it in `other` (ids, int64 [pairs])."""
        for ids in (one, other):
            fresh = ids[self._above[ids] == 0]
            self._hang(fresh, fresh)
        while len(one):
            low, high = self._root(one), self._root(other)
            low, high = np.minimum(low, high), np.maximum(low, high)
            apart = low != high
            order = np.lexsort((low[apart], high[apart]))
            low, high = low[apart][order], high[apart][order]
            # A root hangs itself under the lowest it was paired with; its other pairs wait for the next round.
            first = np.diff(high, prepend=-1) != 0
            moved = high[first]
            self._hang(moved, low[first])
            self._flatten(moved)
            one, other = low[~first], high[~first]

    def finish(self) -> Dropped:
        """Every dropped document hangs under its group's lowest id itself, and the result is valid on disk."""
        dropped = groups = 0
        for at in range(0, self.documents, _BLOCK):
            above = self._above[at : at + _BLOCK]
            ids = np.flatnonzero(above) + at
            roots = self._root(ids)
            groups += int(np.count_nonzero(roots == ids))
            dropped += int(np.count_nonzero(roots != ids))
        if isinstance(self._above, np.memmap):
            self._above.flush()
        facts = {"documents": self.documents, "dropped": dropped, "groups": groups}
        partial = self.folder / (FACTS + ".partial")
        partial.write_text(json.dumps(facts) + "\n")
        partial.replace(self.folder / FACTS)
        return Dropped(self.folder, **facts)

    def _hang(self, ids: np.ndarray, under: np.ndarray) -> None:
        self._above[ids] = under.astype(np.uint64) + np.uint64(1)

    def _parents(self, ids: np.ndarray) -> np.ndarray:
        return self._above[ids].astype(np.int64) - 1

    def _root(self, ids: np.ndarray) -> np.ndarray:
        """The roots of ids, int64, which then hang under them directly."""
        roots = self._parents(ids)
        while not np.array_equal(roots, above := self._parents(roots)):
            roots = above
        self._hang(ids, roots)
        return roots

    def _flatten(self, ids: np.ndarray) -> None:
        """Halves the way up from ids that may hang in one long chain, until each hangs under its root."""
        above = self._parents(ids)
        while not np.array_equal(above, further := self._parents(above)):
            self._hang(ids, further)
            above = further


def _map(path: Path, documents: int, mode: Any) -> np.ndarray:
    """The array in the file; an empty file cannot be mapped."""
    return np.memmap(path, "<u8", mode, shape=(documents,)) if documents else np.empty(0, "<u8")
