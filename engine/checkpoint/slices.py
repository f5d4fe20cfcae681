"""Rectangles of logical tensors: what a rank holds, what a file holds, where they meet, and whether they cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.parallel.sharding import Entry

KINDS = ("model", "master", "exp_avg", "exp_avg_sq")
"""What a checkpoint holds of each parameter; the prefixes of its tensors' names."""

MAX_CELLS = 1 << 24
"""A tensor cut into more cells than this is no checkpoint of ours."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A rectangle to be written. `name`: kind and logical name; `shape`: the whole tensor's; `read`: the values."""

    name: str
    shape: Shape
    start: Shape
    extent: Shape
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def key(self) -> str:
        """Its name in the file: the tensor's own where it is whole, else with its ranges: `name[0:64,32:48]`."""
        if self.extent == self.shape:
            return self.name
        ranges = ",".join(f"{low}:{low + size}" for low, size in zip(self.start, self.extent, strict=True))
        return f"{self.name}[{ranges}]"

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.extent) * self.dtype.itemsize


def part_of(entry: Entry) -> Part:
    """The part that an entry writes."""
    member, tensor = entry.piece.member, entry.tensor
    return Part(entry.name, member.shape, entry.piece.start, entry.piece.extent, tensor.dtype, lambda: tensor)


def overlap(start: Shape, extent: Shape, other: Shape, size: Shape) -> tuple[Shape, Shape] | None:
    """Start and extent of what two rectangles share; None when they do not touch."""
    low = tuple(map(max, start, other))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(start, extent, other, size, strict=True))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def window(tensor: torch.Tensor, start: Shape, extent: Shape, origin: Shape) -> torch.Tensor:
    """The rectangle [start, start + extent) of a tensor whose first element stands at `origin`."""
    return tensor[tuple(slice(a - o, a - o + n) for a, n, o in zip(start, extent, origin, strict=True))]


def cover_fault(shape: Shape, rectangles: Sequence[tuple[Shape, Shape]]) -> str | None:
    """What is wrong with (start, extent) rectangles that should cover `shape` once without overlap; None if nothing."""
    if len(rectangles) == 1 and rectangles[0] == ((0,) * len(shape), shape) and 0 not in shape:
        return None  # most tensors, and without numpy: a file may hold hundreds of thousands
    for start, extent in rectangles:
        if len(start) != len(shape) or len(extent) != len(shape):
            return f"a slice has {len(extent)} dims and the tensor {len(shape)}"
        if any(a < 0 or n < 1 or a + n > s for a, n, s in zip(start, extent, shape, strict=True)):
            return f"the slice at {list(start)} of {list(extent)} lies outside {list(shape)}"
    # Between all the cuts along each dim lie cells; a cell is covered whole or not at all.
    cuts = [np.unique([0, size, *(r[0][d] for r in rectangles), *(r[0][d] + r[1][d] for r in rectangles)])
            for d, size in enumerate(shape)]
    if math.prod(len(edges) for edges in cuts) > MAX_CELLS:
        return f"it is cut into {len(rectangles)} slices, more than can be checked"
    count = np.zeros([max(len(edges) - 1, 1) for edges in cuts], dtype=np.int32)
    for start, extent in rectangles:
        count[tuple(slice(*np.searchsorted(edges, [a, a + n])) for edges, a, n in
                    zip(cuts, start, extent, strict=True))] += 1
    wrong = np.argwhere(count != 1)
    if not len(wrong):
        return None
    place = [int(edges[i]) for edges, i in zip(cuts, wrong[0], strict=True)]
    return f"its slices {'leave a gap' if count[tuple(wrong[0])] == 0 else 'overlap'} at {place}"
