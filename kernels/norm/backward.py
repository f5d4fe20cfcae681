"""The backward kernels of the norms: one for the gradient of x, one that adds up those of weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels.language import INTERPRETING, arch, cdiv, jit, jit_counting, power_of_two, processors, rounded, tl
from engine.kernels.norm.rows import Maybe, addressed, read_rows

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Tile:
    """Of a program: BLOCK_M rows, its warps for RMSNorm and for LayerNorm, and how many a multiprocessor has."""

    block_m: int
    rms_warps: int
    layer_warps: int
    resident: int


# Columns at most -> the tile; BLOCK_N is the power of two that holds them, at most the last line's. Programs stay for
# the whole gradient, so that few sums are left to be added. With so few no block waits while another computes, so tiles
# are loaded ahead: Triton copies them into shared memory asynchronously, 16 bytes a thread.
# - Heads (up to 256): tiles of 2,048 elements, 72 to 128 registers, four programs of 4 warps: with addresses, the
#   arithmetic takes 60 % of the time their bytes take, and more warps hide it.
# - Rows of 257 to 4,096: tiles of 4,096 elements, two programs of 4 warps. A thread holds 32 columns of x and g, and of
#   w and the sum in fp32: 168 registers. A tile takes 440 instructions, a third of the time its bytes take.
# - LayerNorm has a second sum, at 4 warps 250 registers: twice the warps with half of each, about 125.
# - Rows of up to 8,192: twice the warps, and one program, for it has more than half of the register file.
# - Wider rows do not fit: programs have 8,192 columns each, and read the others for the means, out of the L2 cache.
TILES = (
    (32, Tile(64, 4, 4, 4)), (64, Tile(32, 4, 4, 4)), (128, Tile(16, 4, 4, 4)), (256, Tile(8, 4, 4, 4)),
    (512, Tile(8, 4, 8, 2)), (1024, Tile(4, 4, 8, 2)), (2048, Tile(2, 4, 8, 2)), (4096, Tile(1, 4, 8, 2)),
    (8192, Tile(1, 8, 16, 1)),
)
UNDER_WAY = 65536
"""Bytes a multiprocessor loads ahead; latency times bandwidth is about 30 KB."""
SHARED = {80: 160 * 1024, 90: 224 * 1024, 100: 224 * 1024}
"""Bytes of shared memory that a multiprocessor's programs fill, by architecture; elsewhere SHARED_ELSEWHERE."""
SHARED_ELSEWHERE = 96 * 1024
# The sums: 16 KB at a time, and 128 programs for 4,096 columns. Interpreted, a program costs a millisecond whatever its
# size.
SUM_M, SUM_N, SUM_WARPS = 128, 32, 8
INTERPRETED_SUM_N = 1024


def tile_for(width: int, column: int, centred: bool, gpu: int) -> tuple[int, dict[str, Any]]:
    """Programs on a multiprocessor, and what is compiled; `column` is the bytes read of one column."""
    tile = next((tile for most, tile in TILES if width <= most), TILES[-1][1])
    block = min(TILES[-1][0], power_of_two(width))
    if width > block:
        column = 2 * column + 4  # the other columns, and their weights
    fit = SHARED.get(gpu, SHARED_ELSEWHERE) // (tile.resident * tile.block_m * block * column)
    wanted = cdiv(UNDER_WAY, tile.resident * tile.block_m * min(width, block) * column)
    ahead = min(fit, max(2, min(3, wanted)))
    return tile.resident, {"CENTRED": centred, "WIDTH": width, "BLOCK_M": tile.block_m, "BLOCK_N": block,
                           "STAGES": 1 + ahead, "num_warps": tile.layer_warps if centred else tile.rms_warps}


@jit_counting("count")
def _norm_bwd(grad, grad_total, x, weight, mean, rstd, grad_x, parts, group, grad_strides, total_strides, x_strides,
              count, CENTRED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              STAGES: tl.constexpr):
    """Tiles of BLOCK_M rows, from the program's on in steps of the grid, by the BLOCK_N columns of program_id(1). Sums
    of g xhat and of g over a program's rows go into parts [1 or 2, programs, WIDTH]."""
    blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    columns = cols < WIDTH
    # A tile of equal rows. A load of [1, BLOCK_N] would choose a layout of its own, and Triton then moves every tile of
    # x into that one, in which the 128 columns of a head are spread over all warps: 3 times the instructions.
    same = tl.zeros([BLOCK_M, 1], tl.int32)
    w = tl.load(weight + same + cols, (same == 0) & columns, 0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_M)
        real = rows < count
        mask = real[:, None] & columns
        g = read_rows(grad, rows, group, grad_strides, cols, mask, "")
        xhat = read_rows(x, rows, group, x_strides, cols, mask, "")
        scale = tl.load(rstd + rows, real, 0.0)[:, None]
        centre = tl.load(mean + rows, real, 0.0)[:, None] if CENTRED else 0.0
        xhat = (xhat - centre) * scale
        grad_weight += g * xhat
        grad_bias += g
        gw = g * w
        along, plain = tl.sum(gw * xhat, 1), tl.sum(gw, 1)
        for other in range(1, blocks):  # a wider row's other columns, which other programs write
            offs = (tl.program_id(1) + other) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            there = real[:, None] & (offs < WIDTH)
            gw_there = read_rows(grad, rows, group, grad_strides, offs, there, "")
            gw_there *= tl.load(weight + offs, offs < WIDTH, 0.0).to(tl.float32)
            along += tl.sum(gw_there * ((read_rows(x, rows, group, x_strides, offs, there, "") - centre) * scale), 1)
            plain += tl.sum(gw_there, 1)
        result = gw - xhat * (along / WIDTH)[:, None]
        if CENTRED:
            result -= (plain / WIDTH)[:, None]
        result *= scale
        if grad_total is not None:
            result += read_rows(grad_total, rows, group, total_strides, cols, mask, "")
        tl.store(grad_x + rows.to(tl.int64)[:, None] * WIDTH + cols, rounded(result, grad_x.dtype.element_ty), mask)
    part = parts + tl.program_id(0) * WIDTH + cols
    tl.store(part, tl.sum(grad_weight, 0)[None, :], columns)
    if CENTRED:
        tl.store(part + tl.num_programs(0) * WIDTH, tl.sum(grad_bias, 0)[None, :], columns)


@jit
def _norm_bwd_sum(parts, grad_weight, grad_bias, programs, CENTRED: tl.constexpr, WIDTH: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of all programs' parts, always in one order: BLOCK_N columns of the gradient of weight (0) or bias (1)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    which = tl.program_id(1)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, programs, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)[:, None]
        sums += tl.load(parts + (which * programs + part) * WIDTH + cols, (part < programs) & (cols < WIDTH), 0.0)
    result = tl.sum(sums, 0)[None, :]
    if which == 0:
        tl.store(grad_weight + cols, rounded(result, grad_weight.dtype.element_ty), cols < WIDTH)
    elif CENTRED:
        tl.store(grad_bias + cols, rounded(result, grad_bias.dtype.element_ty), cols < WIDTH)


def gradients(grad: Tensor, grad_total: Maybe, x: Tensor, weight: Tensor, bias: Maybe, *_: Tensor) -> Tensors:
    """What `backward` returns, not yet written."""
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            weight.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def backward(grad: Tensor, grad_total: Maybe, x: Tensor, weight: Tensor, bias: Maybe, mean: Tensor,
             rstd: Tensor) -> Tensors:
    """Gradients of x (which is that of a branch too), of weight and of bias (empty without one), from those of y and of
    total; x is what was normalised: total where something was added."""
    grad_x, grad_weight, grad_bias = gradients(grad, grad_total, x, weight, bias, mean, rstd)
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    width, count, centred = x.shape[-1], rstd.numel(), bias is not None
    column = sum(t.element_size() for t in (grad, grad_total, x) if t is not None)
    resident, tile = tile_for(width, column, centred, arch(x.device))
    blocks = cdiv(width, tile["BLOCK_N"])
    programs = min(cdiv(count, tile["BLOCK_M"]), cdiv(resident * processors(x.device), blocks))  # of rows
    parts = x.new_empty((1 + centred, programs, width), dtype=torch.float32)
    group, (grad_, total_, x_), strides = addressed(grad, grad_total, x)
    _norm_bwd[(programs, blocks)](grad_, total_, x_, weight.contiguous(), mean, rstd, grad_x, parts, group,
                                         *strides, count, **tile)
    block = INTERPRETED_SUM_N if INTERPRETING else SUM_N
    _norm_bwd_sum[(cdiv(width, block), 1 + centred)](parts, grad_weight, grad_bias, programs, CENTRED=centred,
                                                     WIDTH=width, BLOCK_M=SUM_M, BLOCK_N=block, num_warps=SUM_WARPS)
    return grad_x, grad_weight, grad_bias
