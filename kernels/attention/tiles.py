"""Tiles of rows of one head: their sizes for each GPU, and how they are loaded.

On Hopper tiles come by the tensor memory accelerator: one thread asks for a tile by its coordinates, so neither
registers nor instructions go into addresses, and what lies outside of the tensor arrives as zeros. Elsewhere, and where
a tensor's strides are no multiples of 16 bytes, they are loaded through pointers, masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.language import HOPPER, SHARED_MEMORY, arch, jit, power_of_two, rounded, shared_memory, tl

L2_BYTES = 1 << 25
"""Of the 40 MB (A100) and 50 MB (H100) of L2 cache, what keys and values may fill."""


@dataclass(frozen=True)
class Tiles:
    """A kernel's BLOCK_M queries and BLOCK_N keys, its warps and the stages of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    described: bool = False
    """Loaded by tensor descriptors."""
    delayed: bool = False
    """Forward: probabilities meet their values an iteration later (see forward.py)."""


def block_d(head_dim: int) -> int:
    """Columns of a tile: the power of two that holds a head, for Triton has no other. The rest is zeros, multiplied all
    the same: 80 to 112 cost as much as 128, 160 and 192 as much as 256."""
    return max(16, power_of_two(head_dim))


def describable(*tensors: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can load all of them: 16-byte addresses and strides, contiguous rows."""
    return arch(tensors[0].device) == HOPPER and all(_aligned(x) for x in tensors)


def _aligned(x: torch.Tensor) -> bool:
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return (x.element_size() == 2 and x.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in strides))


def describe(x: torch.Tensor, tile: list[int]) -> Any:
    """The descriptor of x, for tiles of that shape."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The stride of a dimension of size 1 means nothing, but has to be a multiple of 16 bytes like any other.
    strides = [stride if size > 1 else 8 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], tile)


def source(x: torch.Tensor, block: int, tiles: Tiles) -> Any:
    """What a kernel loads tiles of `block` rows of x [batch, heads, seq, d] from: a descriptor, or x itself."""
    return describe(x, [1, 1, block, block_d(x.shape[3])]) if tiles.described else x


@jit
def head_of(x, batch, head, strides, DESCRIBED: tl.constexpr):
    """The pointer to a head's rows, strides those of (batch, head, row); a descriptor stays as it is."""
    if DESCRIBED:
        return x
    else:
        return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@jit
def load_tile(x, batch, head, row, rows, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
              EDGE: tl.constexpr, DESCRIBED: tl.constexpr):
    """[BLOCK, BLOCK_D] from `row` on, of a descriptor or of what head_of gave; zeros beyond HEAD_DIM columns and, with
    EDGE, beyond `rows`."""
    if DESCRIBED:
        return x.load([batch, head, row, 0]).reshape(BLOCK, BLOCK_D)
    else:
        offs = row + tl.arange(0, BLOCK)
        cols = tl.arange(0, BLOCK_D)
        pointers = x + offs[:, None].to(tl.int64) * strides[2] + cols[None, :]
        if EDGE:
            return tl.load(pointers, mask=(offs[:, None] < rows) & (cols[None, :] < HEAD_DIM), other=0.0)
        elif HEAD_DIM != BLOCK_D:
            return tl.load(pointers, mask=cols[None, :] < HEAD_DIM, other=0.0)
        else:
            return tl.load(pointers)


@jit
def store_tile(x, row, rows, strides, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Writes [BLOCK, BLOCK_D] from `row` on, what lies below `rows` and HEAD_DIM."""
    offs = row + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    tl.store(x + offs[:, None].to(tl.int64) * strides[2] + cols[None, :], rounded(value, x.dtype.element_ty),
             mask=(offs[:, None] < rows) & (cols[None, :] < HEAD_DIM))


# Tiles by how they are loaded and by the width they have to hold (the first that is wide enough), chosen by what the
# compiler makes of them (benchmarks/resources.py): accumulators and scores stay in registers, nothing spills.
#
# Hopper, described: products of 64 rows a warp group.
# - forward holds 128 queries in two warp groups with three stages of 128 keys, 226 of the 227 KB of shared memory; 240
#   registers a thread, so one block of 8 warps on a multiprocessor, whose products run beside the softmax. At 64
#   columns exponentials take as long as the products, and 64 keys a tile leave room for a second block (124 registers),
#   whose products run meanwhile.
# - dkdv holds dk and dv of 128 keys (250 registers), dq that of 128 queries. Two stages do where an iteration ends with
#   a product that nothing waits for and that lasts until the next tiles are there; dq's at 128 columns is too short.
# - At 256 columns tiles of 32 or 64 on the other side are what still fits, in two stages, which a delayed product would
#   lay bare.
_HOPPER = {
    "forward": ((64, Tiles(128, 64, 8, 3, True)), (128, Tiles(128, 128, 8, 3, True, True)),
                (256, Tiles(128, 64, 8, 2, True))),
    "dkdv": ((128, Tiles(64, 128, 8, 2, True)), (256, Tiles(32, 128, 8, 2, True))),
    "dq": ((64, Tiles(128, 64, 8, 2, True)), (128, Tiles(128, 64, 8, 3, True)),
           (256, Tiles(128, 32, 8, 2, True))),
}
# Ampere, and Hopper where the strides do not let a tile be described: products of 16 rows a warp, tiles by cp.async,
# 156 to 236 registers with 8 warps, so one block on a multiprocessor; two or three stages in at most 103 KB.
_AMPERE = {
    "forward": ((128, Tiles(128, 64, 8, 3)), (256, Tiles(64, 32, 8, 2))),
    "dkdv": ((64, Tiles(32, 128, 8, 2)), (128, Tiles(64, 64, 8, 2)), (256, Tiles(32, 64, 8, 2))),
    "dq": ((64, Tiles(128, 32, 8, 2)), (128, Tiles(64, 64, 8, 2)), (256, Tiles(32, 32, 8, 1))),
}
# 99 KB of shared memory (sm_86, 89, 120): above 128 columns dk has half the queries, for 82 KB where 32 of them take
# 100.25; and dq has a second stage, without which Triton 3.6 spills there.
_SMALL = {
    "forward": _AMPERE["forward"],
    "dkdv": (*_AMPERE["dkdv"][:2], (256, Tiles(16, 64, 8, 2))),
    "dq": (*_AMPERE["dq"][:2], (256, Tiles(32, 32, 8, 2))),
}
# fp32: no tensor cores (their tf32 would cut the operands), so tiles are small. For proofs on a GPU, not for speed;
# above 64 columns the gradients of some cases spill.
_SINGLE = {
    "forward": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(32, 32, 8, 1)), (256, Tiles(16, 32, 8, 1))),
    "dkdv": ((64, Tiles(32, 32, 8, 1)), (256, Tiles(16, 16, 8, 1))),
    "dq": ((64, Tiles(32, 32, 8, 1)), (256, Tiles(16, 16, 8, 1))),
}
# Interpreted: small enough for a few dozen rows to have edges and blocks seen whole.
_INTERPRETED = {"forward": Tiles(32, 16, 4, 1), "dkdv": Tiles(16, 32, 4, 1), "dq": Tiles(32, 16, 4, 1)}


def tiles_for(kernel: str, *tensors: torch.Tensor) -> Tiles:
    """The tiles of "forward", "dkdv" or "dq" for the tensors it loads, q first."""
    q = tensors[0]
    gpu = arch(q.device)
    if gpu == 0:
        return _INTERPRETED[kernel]
    if q.element_size() == 4:
        table = _SINGLE
    elif describable(*tensors):
        table = _HOPPER
    else:
        table = _AMPERE if shared_memory(gpu) >= SHARED_MEMORY[80] else _SMALL
    return next(tiles for widest, tiles in table[kernel] if block_d(q.shape[-1]) <= widest)
