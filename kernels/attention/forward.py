"""The forward kernel of attention: y and the logarithm of each query's sum of exponentials.

A program holds BLOCK_M queries and goes over the blocks of BLOCK_N keys that they see, keeping for each query row_max,
the largest score so far, row_sum = sum exp(s - row_max) and acc, the unnormalised y (arXiv:2205.14135, algorithm 1;
arXiv:2307.08691, algorithm 1). Scores are kept in units of log 2, so that exp is one instruction.

Blocks at the edges of what is seen come first, masked, then those seen whole. For these Hopper has a loop of its own:
the products of a warp group run beside its other instructions, but Triton waits for q k^T at once, and softmax needs
it; so an iteration multiplies the previous one's probabilities with their values while it computes its own.
"""

from __future__ import annotations

import math

import torch

from engine.kernels.attention.bounds import edge_block, keys_of_block, schedule
from engine.kernels.attention.tiles import L2_BYTES, Tiles, block_d, head_of, load_tile, source, store_tile, tiles_for
from engine.kernels.language import LN2, cdiv, dot, jit, jit_counting, rounded, tl


@jit
def _edge_blocks(acc, row_sum, row_max, q, k, v, k_strides, v_strides, batch, kv_head, n_min, full_min, full_max, n_max,
                 key_first, key_last, seq_k, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_N: tl.constexpr, NEAR: tl.constexpr, DESCRIBED: tl.constexpr):
    """The blocks that are not seen whole; NEAR: the near edge of a window or document may be among them."""
    for index in range(0, n_max - full_max + full_min - n_min):
        start_n = (edge_block(index, n_min, full_min, full_max) if NEAR else full_max + index) * BLOCK_N
        tile = load_tile(k, batch, kv_head, start_n, seq_k, k_strides, HEAD_DIM, BLOCK_D, BLOCK_N, True, DESCRIBED)
        s = dot(q, tl.trans(tile), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        offs_n = start_n + tl.arange(0, BLOCK_N)
        seen = offs_n[None, :] <= key_last[:, None]
        if NEAR:
            seen = seen & (offs_n[None, :] >= key_first[:, None])
        s = tl.where(seen, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key seen yet: exp(-inf), not NaN
        p = tl.exp2(s * scale - base[:, None])
        shrink = tl.exp2(row_max - base)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        tile = load_tile(v, batch, kv_head, start_n, seq_k, v_strides, HEAD_DIM, BLOCK_D, BLOCK_N, True, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@jit
def _full_blocks(acc, row_sum, row_max, q, k, v, k_strides, v_strides, batch, kv_head, full_min, full_max, seq_k, scale,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr):
    """The blocks that every query of the program sees whole."""
    for n in range(full_min, full_max):
        tile = load_tile(k, batch, kv_head, n * BLOCK_N, seq_k, k_strides, HEAD_DIM, BLOCK_D, BLOCK_N, False, DESCRIBED)
        s = dot(q, tl.trans(tile), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        tile = load_tile(v, batch, kv_head, n * BLOCK_N, seq_k, v_strides, HEAD_DIM, BLOCK_D, BLOCK_N, False, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@jit
def _full_blocks_delayed(acc, row_sum, row_max, q, k, v, k_strides, v_strides, batch, kv_head, full_min, full_max,
                         seq_k, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                         DESCRIBED: tl.constexpr):
    """The same; p and shrink are those of the block before, and the first product is with zeros.

    p stays in fp32 between iterations: carried in 16 bits, Triton would take it through shared memory.
    """
    p = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    shrink = tl.full([q.shape[0]], 1.0, tl.float32)
    for n in range(full_min, full_max):
        tile = load_tile(k, batch, kv_head, n * BLOCK_N, seq_k, k_strides, HEAD_DIM, BLOCK_D, BLOCK_N, False, DESCRIBED)
        s = dot(q, tl.trans(tile), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        tile = load_tile(v, batch, kv_head, tl.maximum(n - 1, full_min) * BLOCK_N, seq_k, v_strides, HEAD_DIM, BLOCK_D,
                         BLOCK_N, False, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
        p = tl.exp2(s * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
    if full_min < full_max:
        tile = load_tile(v, batch, kv_head, (full_max - 1) * BLOCK_N, seq_k, v_strides, HEAD_DIM, BLOCK_D, BLOCK_N,
                         False, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
    return acc, row_sum, row_max


@jit_counting("heads", "group", "items", "seq_q", "seq_k", "window", "section")
def _attn_fwd(q, k, v, y, lse, start, end, q_strides, k_strides, v_strides, y_strides, heads, group, items, seq_q,
              seq_k, window, section, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
              DESCRIBED: tl.constexpr, DELAYED: tl.constexpr):
    """BLOCK_M queries of one head; strides are those of (batch, head, row)."""
    item, block = schedule(tl.program_id(0), items, tl.cdiv(seq_q, BLOCK_M), section, CAUSAL)
    batch = item // heads
    head = item % heads
    start_m = block * BLOCK_M
    if PACKED:
        start += batch * seq_q
        end += batch * seq_q
    offs_m = start_m + tl.arange(0, BLOCK_M)
    key_first, key_last, n_min, full_min, full_max, n_max = keys_of_block(
        start_m, seq_q, seq_k, window, start, end, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, PACKED)

    q_tile = load_tile(head_of(q, batch, head, q_strides, DESCRIBED), batch, head, start_m, seq_q, q_strides, HEAD_DIM,
                       BLOCK_D, BLOCK_M, True, DESCRIBED)
    kv_head = head // group
    k = head_of(k, batch, kv_head, k_strides, DESCRIBED)
    v = head_of(v, batch, kv_head, v_strides, DESCRIBED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, row_sum, row_max = _edge_blocks(acc, row_sum, row_max, q_tile, k, v, k_strides, v_strides, batch, kv_head,
                                         n_min, full_min, full_max, n_max, key_first, key_last, seq_k, scale, HEAD_DIM,
                                         BLOCK_D, BLOCK_N, WINDOW or PACKED, DESCRIBED)
    if DELAYED:
        acc, row_sum, row_max = _full_blocks_delayed(acc, row_sum, row_max, q_tile, k, v, k_strides, v_strides, batch,
                                                     kv_head, full_min, full_max, seq_k, scale, HEAD_DIM, BLOCK_D,
                                                     BLOCK_N, DESCRIBED)
    else:
        acc, row_sum, row_max = _full_blocks(acc, row_sum, row_max, q_tile, k, v, k_strides, v_strides, batch, kv_head,
                                             full_min, full_max, seq_k, scale, HEAD_DIM, BLOCK_D, BLOCK_N, DESCRIBED)

    some = row_sum > 0.0
    row_sum = tl.where(some, row_sum, 1.0)  # a query that sees nothing: its acc is 0
    acc = acc * (1.0 / row_sum)[:, None]
    value = tl.where(some, (row_max + tl.log2(row_sum)) * LN2, float("-inf"))
    tl.store(lse + item.to(tl.int64) * seq_q + offs_m, value, mask=offs_m < seq_q)
    store_tile(head_of(y, batch, head, y_strides, False), start_m, seq_q, y_strides, acc, HEAD_DIM, BLOCK_D, BLOCK_M)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None,
            causal: bool, window: int, scale: float, tiles: Tiles | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q [batch, heads, seq_q, d], k and v [batch, kv_heads, seq_k, d] -> (y [batch, heads, seq_q, d], laid out [batch,
    seq_q, heads, d], and lse [batch, heads, seq_q] in fp32: natural logarithms, -inf where a query sees nothing).

    `start` and `end` are those of document_bounds or None; `window` 0 is none. Strides are free but for the last, which
    is made 1 by a copy if need be.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, seq_q, d = q.shape
    kv_heads, seq_k = k.shape[1:3]
    y = q.new_empty(batch, seq_q, heads, d).transpose(1, 2)
    lse = q.new_empty(batch, heads, seq_q, dtype=torch.float32)
    if q.numel() == 0 or seq_k == 0:
        return y.zero_(), lse.fill_(float("-inf"))
    tiles = tiles or tiles_for("forward", q, k, v)
    group = heads // kv_heads
    section = group * max(1, L2_BYTES // (2 * seq_k * d * q.element_size()))
    _attn_fwd[(batch * heads * cdiv(seq_q, tiles.block_m),)](
        source(q, tiles.block_m, tiles), source(k, tiles.block_n, tiles), source(v, tiles.block_n, tiles), y, lse,
        start, end, *(x.stride()[:3] for x in (q, k, v, y)), heads, group, batch * heads, seq_q, seq_k, window, section,
        scale * math.log2(math.e), HEAD_DIM=d, BLOCK_D=block_d(d), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        CAUSAL=causal, WINDOW=window > 0, PACKED=start is not None, DESCRIBED=tiles.described, DELAYED=tiles.delayed,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return y, lse
