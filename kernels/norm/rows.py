"""Where rows begin: the heads of q in a wider tensor are addressed as they lie, not copied."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.language import jit, tl

Maybe = Tensor | None


@jit
def read_rows(x, rows, group, strides, cols, mask, policy: tl.constexpr):
    """Columns of rows as fp32, 0 where masked; `group` and `strides` as of `addressed`."""
    starts = (rows // group).to(tl.int64) * strides[0] + (rows % group).to(tl.int64) * strides[1]
    return tl.load(x + starts[:, None] + cols, mask, 0.0, eviction_policy=policy).to(tl.float32)


def _levels(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of as few dims as the rows of x [..., width] can be counted by, outermost first."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size > 1:
            dims.append((size, stride))
    return dims or [(1, 0)]


def addressed(*tensors: Maybe) -> tuple[int, list[Maybe], list[tuple[int, int]]]:
    """A group size, the tensors, and two strides for each: row i begins at (i // group) outer + (i % group) inner.
    That is enough for the heads of q in [batch, seq, heads, head_dim], sliced from a wider tensor. What it does not
    describe, and what has other neighbours than a row's columns, is copied."""
    group, found = 1, list(tensors)
    for i, x in enumerate(tensors):
        if x is not None:
            inner = [size for size, _ in _levels(x)[1:]]
            if x.stride(-1) != 1 or len(inner) > 1 or (inner and group not in (1, inner[0])):
                found[i] = x.contiguous()
            elif inner:
                group = inner[0]
    levels = [[(1, 0)] if x is None else _levels(x) for x in found]
    return group, found, [(dims[0][1] * (group if len(dims) == 1 else 1), dims[-1][1]) for dims in levels]
