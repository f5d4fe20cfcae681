"""Documents in an order chosen by a seed, in external memory: two sequential passes, whatever the corpus' size.

Position i of the result holds document permute(i). The positions are cut into buckets that fit into memory. The first
pass reads the documents in order and writes each to its bucket, in one spool file where every bucket has a place of
the size it needs; the second reads a bucket, orders it, and hands it on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.samples import mix, permute_inverse

Batch = tuple[np.ndarray, np.ndarray]
"""Tokens of documents one after another [total], and the length of each [n], int64."""

Batches = Callable[[], Iterator[Batch]]
"""Reads documents from the first to the last, as often as it is called, a bounded number of tokens at a time."""

_WHERE = np.dtype([("position", "<i8"), ("length", "<i8")])


def shuffled(lengths: Callable[[], Iterator[np.ndarray]], batches: Batches, documents: int, seed: int, spool: Path,
             dtype: np.dtype[Any], memory: int) -> Iterator[Batch]:
    """The documents in the seed's order, in batches. lengths: reads the lengths alone, in the order of the documents.

    spool: a name for files that are made and removed, as large as the corpus; memory in bytes, roughly kept."""
    if documents == 0:
        return
    key = mix(seed)
    total = sum(int(part.sum()) for part in lengths()) * dtype.itemsize
    count = min(documents, max(1, -(-total * 4 // memory), -(-documents * 64 // memory)))
    each = -(-documents // count)
    starts = _bucket_starts(lengths, documents, each, key)  # [buckets + 1], in tokens
    tokens, where = spool.with_name(spool.name + ".tokens"), spool.with_name(spool.name + ".where")
    try:
        with open(tokens, "w+b", buffering=0) as token_file, open(where, "w+b", buffering=0) as where_file:
            _distribute(batches, documents, each, key, starts, token_file.fileno(), where_file.fileno(), dtype)
            for bucket in range(len(starts) - 1):
                size = min(each, documents - bucket * each)
                places = np.frombuffer(_read(where_file.fileno(), bucket * each * _WHERE.itemsize,
                                             size * _WHERE.itemsize), _WHERE)
                low, high = int(starts[bucket]) * dtype.itemsize, int(starts[bucket + 1]) * dtype.itemsize
                held = np.frombuffer(_read(token_file.fileno(), low, high - low), dtype)
                order = np.argsort(places["position"])
                yield gather(held, places["length"], order)
    finally:
        for path in (tokens, where):
            path.unlink(missing_ok=True)


def gather(tokens: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> Batch:
    """Documents, given one after another, in another order."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    pairs = zip(starts[order].tolist(), ends[order].tolist(), strict=True)
    picked = [tokens[start:end] for start, end in pairs]
    return np.concatenate(picked) if picked else tokens[:0], lengths[order]


def _bucket_starts(lengths: Callable[[], Iterator[np.ndarray]], documents: int, each: int, key: int) -> np.ndarray:
    """Where each bucket begins in the spool, in tokens, int64 [buckets + 1]."""
    sizes = np.zeros(-(-documents // each) + 1, np.int64)
    at = 0
    for part in lengths():
        bucket = permute_inverse(np.arange(at, at + len(part)), documents, key) // each
        np.add.at(sizes, bucket + 1, part)
        at += len(part)
    return np.cumsum(sizes)


def _distribute(batches: Batches, documents: int, each: int, key: int, starts: np.ndarray, token_file: int,
                where_file: int, dtype: np.dtype[Any]) -> None:
    """Writes each document to its bucket."""
    filled, counted = starts[:-1].copy(), np.arange(len(starts) - 1, dtype=np.int64) * each
    at = 0
    for tokens, lengths in batches():
        positions = permute_inverse(np.arange(at, at + len(lengths)), documents, key)
        at += len(lengths)
        buckets = positions // each
        order = np.argsort(buckets, kind="stable")
        moved, sizes = gather(tokens, lengths, order)
        where = np.empty(len(order), _WHERE)
        where["position"], where["length"] = positions[order], sizes
        ends = np.cumsum(sizes)
        cuts = np.flatnonzero(np.diff(buckets[order], prepend=-1))
        for first, last in zip(cuts.tolist(), [*cuts[1:].tolist(), len(order)], strict=True):
            bucket = int(buckets[order[first]])
            part = moved[int(ends[first] - sizes[first]) : int(ends[last - 1])]
            _write(token_file, int(filled[bucket]) * dtype.itemsize, np.ascontiguousarray(part, dtype))
            _write(where_file, int(counted[bucket]) * _WHERE.itemsize, where[first:last])
            filled[bucket] += len(part)
            counted[bucket] += last - first


def _write(file: int, offset: int, array: np.ndarray) -> None:
    view = memoryview(array.tobytes())
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _read(file: int, offset: int, size: int) -> bytearray:
    out = bytearray(size)
    view = memoryview(out)
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise OSError(f"the spool ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count
    return out
