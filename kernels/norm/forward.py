"""The forward kernel of the norms."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.language import cdiv, jit_counting, power_of_two, rounded, tl
from engine.kernels.norm.rows import Maybe, addressed, read_rows

Tensors = tuple[Tensor, ...]

# Columns at most -> BLOCK_M, num_warps; BLOCK_N is the power of two that holds them. A row of up to 4,096 columns by 4
# warps, above that a warp for every 1,024 columns: 32 columns a thread, four loads of 16 bytes under way at once in
# bf16. That takes 40 to 80 registers, so 6 to 10 blocks of 4 warps (half as many of 8) are on a multiprocessor, with
# 64 KB or more under way where bandwidth times latency is about 30 KB. Narrower rows are taken together to as many
# elements: a head's (64 to 256) are then summed inside a warp.
TILES = (
    (64, (64, 4)), (128, (32, 4)), (256, (16, 4)), (512, (8, 4)), (1024, (4, 4)), (2048, (2, 4)), (4096, (1, 4)),
    (8192, (1, 8)), (16384, (1, 16)), (32768, (1, 32)),
)
WIDEST = TILES[-1][0]
"""Columns of a row that fit in one block's registers."""


def tile_for(width: int) -> dict[str, int]:
    """What is compiled for rows of `width`, up to WIDEST."""
    rows, warps = next(tile for most, tile in TILES if width <= most)
    return {"WIDTH": width, "BLOCK_M": rows, "BLOCK_N": power_of_two(width), "num_warps": warps}


@jit_counting("count")
def _norm_fwd(x, branch, weight, bias, y, total, mean, rstd, group, x_strides, branch_strides, count, eps,
              WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M whole rows; `branch` is None where nothing is added, `bias` is None for RMSNorm. What is read once leaves
    the L1 cache to the weight, which every block reads."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)[None, :]
    real, columns = rows < count, cols < WIDTH
    mask = real[:, None] & columns
    out = rows.to(tl.int64)[:, None] * WIDTH + cols
    value = read_rows(x, rows, group, x_strides, cols, mask, "evict_first")
    if branch is not None:
        value += read_rows(branch, rows, group, branch_strides, cols, mask, "evict_first")
        stored = rounded(value, total.dtype.element_ty)
        tl.store(total + out, stored, mask)
        value = stored.to(tl.float32)
    if bias is not None:
        centre = tl.sum(value, 1) / WIDTH
        tl.store(mean + rows, centre, real)
        value = tl.where(mask, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    tl.store(rstd + rows, scale, real)
    value = value * scale[:, None] * tl.load(weight + cols, columns, 0.0, eviction_policy="evict_last").to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, columns, 0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y + out, rounded(value, y.dtype.element_ty), mask)


def outputs(x: Tensor, branch: Maybe, weight: Tensor, bias: Maybe, eps: float) -> Tensors:
    """What `forward` returns, not yet written."""
    count = x.numel() // max(1, x.shape[-1])
    return (x.new_empty(x.shape), x.new_empty(0 if branch is None else x.shape),
            x.new_empty(0 if bias is None else count, dtype=torch.float32), x.new_empty(count, dtype=torch.float32))


def forward(x: Tensor, branch: Maybe, weight: Tensor, bias: Maybe, eps: float) -> Tensors:
    """y, total, mean and rstd: total is empty without a branch, mean without a bias, which is RMSNorm. x, branch and
    results [..., width], weight and bias [width]; the statistics are fp32, one a row."""
    y, total, mean, rstd = outputs(x, branch, weight, bias, eps)
    if x.numel():
        group, (x_, branch_), strides = addressed(x, branch)
        tile = tile_for(x.shape[-1])
        _norm_fwd[(cdiv(rstd.numel(), tile["BLOCK_M"]),)](
            x_, branch_, weight.contiguous(), None if bias is None else bias.contiguous(), y, total, mean, rstd, group,
            *strides, rstd.numel(), eps, **tile)
    return y, total, mean, rstd
