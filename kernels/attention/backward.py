"""The backward kernels of attention: one for k and v, one for q, nothing added atomically, so that runs repeat.

With p = exp(s - lse) and the gradient dy: dv = p^T dy, dp = dy v^T, ds = p (dp - delta), dk = scale ds^T q and
dq = scale ds k, where delta = rowsum(y dy) (arXiv:2205.14135, algorithm 4) less the gradient of lse, for
d lse / d s = p. Scores are computed again in both kernels: seven products in all where five would do with atomics.

A program of the first kernel holds a block of keys and goes over the blocks of queries that see them, of every head of
the group, so that the sum over the group is formed in registers; a program of the second goes over the keys as forward
does. In both the products that need no waiting for run beside the other instructions of their warps: dp beside the
exponentials, which it does not depend on, and dv, dk and dq until the next scores are needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.kernels.attention.bounds import block_range, edge_block, keys_of_block, query_range, schedule
from engine.kernels.attention.tiles import (
    L2_BYTES,
    Tiles,
    block_d,
    describe,
    head_of,
    load_tile,
    source,
    store_tile,
    tiles_for,
)
from engine.kernels.language import LOG2E, cdiv, dot, jit, jit_counting, processors, rounded, tl

PREPROCESS_M = 128
"""Rows of a program of the preprocessing kernel, and what statistics are padded to: no tile of queries is longer, so
that they are loaded without masks."""


@jit_counting("heads", "seq_q")
def _attn_bwd_preprocess(y, dy, lse, dlse, lse2, delta, y_strides, dy_strides, heads, seq_q, HEAD_DIM: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LSE: tl.constexpr):
    """delta, and lse in units of log 2, +inf where a query sees nothing: its probabilities come out as exp(-inf)."""
    item = tl.program_id(1)
    batch = item // heads
    head = item % heads
    start_m = tl.program_id(0) * BLOCK_M
    y_tile = load_tile(head_of(y, batch, head, y_strides, False), batch, head, start_m, seq_q, y_strides, HEAD_DIM,
                       BLOCK_D, BLOCK_M, True, False)
    dy_tile = load_tile(head_of(dy, batch, head, dy_strides, False), batch, head, start_m, seq_q, dy_strides, HEAD_DIM,
                        BLOCK_D, BLOCK_M, True, False)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs = item.to(tl.int64) * seq_q + offs_m
    value = tl.load(lse + offs, mask=offs_m < seq_q, other=float("-inf"))
    value = tl.where(value == float("-inf"), float("inf"), value * LOG2E)
    product = tl.sum(y_tile.to(tl.float32) * dy_tile.to(tl.float32), 1)
    if LSE:
        product -= tl.load(dlse + offs, mask=offs_m < seq_q, other=0.0)
    offs = item.to(tl.int64) * (tl.num_programs(0) * BLOCK_M) + offs_m
    tl.store(lse2 + offs, value)
    tl.store(delta + offs, product)


@jit
def _load_statistic(x, item, start_m, length, BLOCK_M: tl.constexpr, DESCRIBED: tl.constexpr):
    """[BLOCK_M] of an item's `length` numbers."""
    if DESCRIBED:
        return x.load([item, start_m]).reshape(BLOCK_M)
    else:
        return tl.load(x + item.to(tl.int64) * length + start_m + tl.arange(0, BLOCK_M))


@jit
def _dkdv_blocks(dk_acc, dv_acc, k_tile, v_tile, q, dy, lse2, delta, q_strides, dy_strides, batch, head, item, turns,
                 m_min, full_min, full_max, m_max, start_n, seq_q, seq_k, window, start, end, length, scale2,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
                 WINDOW: tl.constexpr, PACKED: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
                 DK: tl.constexpr, DV: tl.constexpr):
    """Adds what `turns` heads from `head` on give to the keys from `start_n` on, by the edges (EDGE) or by what is seen
    whole.

    The turns and blocks are one loop, so that the pipeline is filled once. `item` is head's place in statistics.
    """
    count = (m_max - full_max + full_min - m_min) if EDGE else (full_max - full_min)
    for index in range(0, turns * count):
        turn = index // count
        m = index % count
        start_m = (edge_block(m, m_min, full_min, full_max) if EDGE else full_min + m) * BLOCK_M
        q_tile = load_tile(head_of(q, batch, head + turn, q_strides, DESCRIBED), batch, head + turn, start_m, seq_q,
                           q_strides, HEAD_DIM, BLOCK_D, BLOCK_M, EDGE, DESCRIBED)
        s = dot(k_tile, tl.trans(q_tile), tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32))
        dy_tile = load_tile(head_of(dy, batch, head + turn, dy_strides, DESCRIBED), batch, head + turn, start_m, seq_q,
                            dy_strides, HEAD_DIM, BLOCK_D, BLOCK_M, EDGE, DESCRIBED)
        row_lse = _load_statistic(lse2, item + turn, start_m, length, BLOCK_M, DESCRIBED)
        if DK:
            dp = dot(v_tile, tl.trans(dy_tile), tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32))
        p = tl.exp2(s * scale2 - row_lse[None, :])
        if EDGE:
            # Made anew for each of the few blocks at an edge: held through the loop they would be registers too many.
            offs_n = tl.minimum(start_n + tl.arange(0, k_tile.shape[0]), seq_k - 1)
            first, last = query_range(offs_n, seq_q, seq_k, window, start, end, CAUSAL, WINDOW, PACKED)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            seen = offs_m[None, :] >= first[:, None]
            if WINDOW or PACKED:
                seen = seen & (offs_m[None, :] <= last[:, None])
            p = tl.where(seen, p, 0.0)
        # Both operands are made before either product begins: registers that a product reads may not be written while
        # another runs, or the assembler lets each one finish before the next.
        if DK:
            row_delta = _load_statistic(delta, item + turn, start_m, length, BLOCK_M, DESCRIBED)
            ds = rounded(p * (dp - row_delta[None, :]), q_tile.dtype)
        if DV:
            dv_acc = dot(rounded(p, dy_tile.dtype), dy_tile, dv_acc)
        if DK:
            dk_acc = dot(ds, q_tile, dk_acc)
    return dk_acc, dv_acc


@jit_counting("kv_heads", "group", "splits", "items", "seq_q", "length", "seq_k", "window", "section")
def _attn_bwd_dkdv(q, k, v, dy, lse2, delta, dk, dv, start, end, q_strides, k_strides, v_strides, dy_strides, d_split,
                   d_strides, kv_heads, group, splits, items, seq_q, length, seq_k, window, section, scale2, scale,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, DESCRIBED: tl.constexpr,
                   DK: tl.constexpr, DV: tl.constexpr):
    """dk and dv of BLOCK_N keys; strides are those of (batch, head, row), d_strides those of dk and of dv."""
    item, block = schedule(tl.program_id(0), items, tl.cdiv(seq_k, BLOCK_N), section, False)
    split = item % splits
    batch = item // splits // kv_heads
    kv_head = item // splits % kv_heads
    start_n = block * BLOCK_N
    if PACKED:
        start += batch * seq_q
        end += batch * seq_q
    low_first, high_first = query_range(start_n, seq_q, seq_k, window, start, end, CAUSAL, WINDOW, PACKED)
    low_last, high_last = query_range(tl.minimum(start_n + BLOCK_N, seq_k) - 1, seq_q, seq_k, window, start, end,
                                      CAUSAL, WINDOW, PACKED)
    m_min, full_min, full_max, m_max = block_range(low_first, low_last, high_first, high_last, BLOCK_M)

    k_tile = load_tile(head_of(k, batch, kv_head, k_strides, DESCRIBED), batch, kv_head, start_n, seq_k, k_strides,
                       HEAD_DIM, BLOCK_D, BLOCK_N, True, DESCRIBED)
    v_tile = k_tile
    if DK:
        v_tile = load_tile(head_of(v, batch, kv_head, v_strides, DESCRIBED), batch, kv_head, start_n, seq_k, v_strides,
                           HEAD_DIM, BLOCK_D, BLOCK_N, True, DESCRIBED)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D if DK else 16], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D if DV else 16], tl.float32)
    turns = group // splits
    head = kv_head * group + split * turns
    first_item = batch * kv_heads * group + head
    for part in tl.static_range(2):  # the edges, then what is seen whole
        dk_acc, dv_acc = _dkdv_blocks(dk_acc, dv_acc, k_tile, v_tile, q, dy, lse2, delta, q_strides, dy_strides, batch,
                                      head, first_item, turns, m_min, full_min, full_max, m_max, start_n, seq_q, seq_k,
                                      window, start, end, length, scale2, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, WINDOW,
                                      PACKED, part == 0, DESCRIBED, DK, DV)
    offset = split.to(tl.int64) * d_split
    if DK:
        store_tile(head_of(dk + offset, batch, kv_head, d_strides, False), start_n, seq_k, d_strides, dk_acc * scale,
                   HEAD_DIM, BLOCK_D, BLOCK_N)
    if DV:
        store_tile(head_of(dv + offset, batch, kv_head, d_strides, False), start_n, seq_k, d_strides, dv_acc, HEAD_DIM,
                   BLOCK_D, BLOCK_N)


@jit
def _dq_blocks(dq_acc, q_tile, dy_tile, row_lse, row_delta, k, v, k_strides, v_strides, batch, kv_head, n_min, full_min,
               full_max, n_max, key_first, key_last, seq_k, scale2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_N: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr):
    """Adds what blocks of keys give to dq, by the edges (EDGE) or by what is seen whole."""
    for index in range(0, (n_max - full_max + full_min - n_min) if EDGE else (full_max - full_min)):
        start_n = (edge_block(index, n_min, full_min, full_max) if EDGE else full_min + index) * BLOCK_N
        k_tile = load_tile(k, batch, kv_head, start_n, seq_k, k_strides, HEAD_DIM, BLOCK_D, BLOCK_N, EDGE, DESCRIBED)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))
        v_tile = load_tile(v, batch, kv_head, start_n, seq_k, v_strides, HEAD_DIM, BLOCK_D, BLOCK_N, EDGE, DESCRIBED)
        dp = dot(dy_tile, tl.trans(v_tile), tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32))
        p = tl.exp2(s * scale2 - row_lse[:, None])
        if EDGE:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            p = tl.where((offs_n[None, :] >= key_first[:, None]) & (offs_n[None, :] <= key_last[:, None]), p, 0.0)
        ds = p * (dp - row_delta[:, None])
        dq_acc = dot(rounded(ds, k_tile.dtype), k_tile, dq_acc)
    return dq_acc


@jit_counting("heads", "group", "items", "seq_q", "length", "seq_k", "window", "section")
def _attn_bwd_dq(q, k, v, dy, lse2, delta, dq, start, end, q_strides, k_strides, v_strides, dy_strides, dq_strides,
                 heads, group, items, seq_q, length, seq_k, window, section, scale2, scale, HEAD_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                 WINDOW: tl.constexpr, PACKED: tl.constexpr, DESCRIBED: tl.constexpr):
    """dq of BLOCK_M queries; strides are those of (batch, head, row)."""
    item, block = schedule(tl.program_id(0), items, tl.cdiv(seq_q, BLOCK_M), section, CAUSAL)
    batch = item // heads
    head = item % heads
    start_m = block * BLOCK_M
    if PACKED:
        start += batch * seq_q
        end += batch * seq_q
    key_first, key_last, n_min, full_min, full_max, n_max = keys_of_block(
        start_m, seq_q, seq_k, window, start, end, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, PACKED)

    q_tile = load_tile(head_of(q, batch, head, q_strides, DESCRIBED), batch, head, start_m, seq_q, q_strides, HEAD_DIM,
                       BLOCK_D, BLOCK_M, True, DESCRIBED)
    dy_tile = load_tile(head_of(dy, batch, head, dy_strides, DESCRIBED), batch, head, start_m, seq_q, dy_strides,
                        HEAD_DIM, BLOCK_D, BLOCK_M, True, DESCRIBED)
    row_lse = _load_statistic(lse2, item, start_m, length, BLOCK_M, False)
    row_delta = _load_statistic(delta, item, start_m, length, BLOCK_M, False)
    kv_head = head // group
    k = head_of(k, batch, kv_head, k_strides, DESCRIBED)
    v = head_of(v, batch, kv_head, v_strides, DESCRIBED)
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(2):  # the edges, then what is seen whole
        dq_acc = _dq_blocks(dq_acc, q_tile, dy_tile, row_lse, row_delta, k, v, k_strides, v_strides, batch, kv_head,
                            n_min, full_min, full_max, n_max, key_first, key_last, seq_k, scale2, HEAD_DIM, BLOCK_D,
                            BLOCK_N, part == 0, DESCRIBED)
    store_tile(head_of(dq, batch, head, dq_strides, False), start_m, seq_q, dq_strides, dq_acc * scale, HEAD_DIM,
               BLOCK_D, BLOCK_M)


def backward(dy: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             y: torch.Tensor, lse: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, causal: bool,
             window: int, scale: float, tiles: tuple[Tiles, Tiles] | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v, laid out [batch, seq, heads, d]; arguments as those and the results of
    forward, dy like y, dlse like lse or None; `tiles` those of dkdv and of dq. Strides are free but for the last."""
    q, k, v, y, dy = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, y, dy))
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                  for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    lse2, delta = _launch_preprocess(dy, dlse, y, lse)
    for_dkdv, for_dq = tiles or (tiles_for("dkdv", q, k, v, dy), tiles_for("dq", q, k, v, dy))
    _launch_dkdv(dy, q, k, v, lse2, delta, dk, dv, start, end, causal, window, scale, for_dkdv)
    _launch_dq(dy, q, k, v, lse2, delta, dq, start, end, causal, window, scale, for_dq)
    return dq, dk, dv


def _launch_preprocess(dy: torch.Tensor, dlse: torch.Tensor | None, y: torch.Tensor,
                       lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """lse in units of log 2 and delta, both [batch * heads, seq_q rounded up to PREPROCESS_M] in fp32."""
    batch, heads, seq_q, d = y.shape
    blocks = cdiv(seq_q, PREPROCESS_M)
    lse2, delta = (lse.new_empty(batch * heads, blocks * PREPROCESS_M) for _ in range(2))
    _attn_bwd_preprocess[(blocks, batch * heads)](
        y, dy, lse, None if dlse is None else dlse.contiguous(), lse2, delta, y.stride()[:3], dy.stride()[:3], heads,
        seq_q, HEAD_DIM=d, BLOCK_D=block_d(d), BLOCK_M=PREPROCESS_M, LSE=dlse is not None,
        num_warps=4 if block_d(d) <= 128 else 8)  # 256 columns by 4 warps spill on sm_120
    return lse2, delta


def _launch_dkdv(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse2: torch.Tensor,
                 delta: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, start: torch.Tensor | None,
                 end: torch.Tensor | None, causal: bool, window: int, scale: float, tiles: Tiles) -> None:
    """Fills dk and dv. Where there are too few blocks of keys for the multiprocessors the heads of a group are split
    over programs, whose sums are added in a fixed order."""
    batch, heads, seq_q, d = q.shape
    kv_heads, seq_k = k.shape[1:3]
    group, blocks = heads // kv_heads, cdiv(seq_k, tiles.block_n)
    splits = splits_of(group, batch * kv_heads * blocks, processors(q.device))
    parts = [x if splits == 1 else x.new_empty(splits, batch, seq_k, kv_heads, d, dtype=torch.float32).transpose(2, 3)
             for x in (dk, dv)]
    d_split, d_strides = (0, dk.stride()[:3]) if splits == 1 else (parts[0].stride(0), parts[0].stride()[1:4])
    section = splits * max(1, L2_BYTES // (2 * group * seq_q * d * q.element_size()))

    def statistic(x: torch.Tensor) -> Any:
        return describe(x, [1, tiles.block_m]) if tiles.described else x

    # Accumulators of 256 columns for both gradients are more than registers hold: each by itself then, s twice.
    for of_k, of_v in ((True, True),) if block_d(d) <= 128 else ((True, False), (False, True)):
        _attn_bwd_dkdv[(batch * kv_heads * splits * blocks,)](
            source(q, tiles.block_m, tiles), source(k, tiles.block_n, tiles), source(v, tiles.block_n, tiles),
            source(dy, tiles.block_m, tiles), statistic(lse2), statistic(delta), *parts, start, end,
            *(x.stride()[:3] for x in (q, k, v, dy)), d_split, d_strides, kv_heads, group, splits,
            batch * kv_heads * splits, seq_q, lse2.shape[-1], seq_k, window, section, scale * math.log2(math.e), scale,
            HEAD_DIM=d, BLOCK_D=block_d(d), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, CAUSAL=causal,
            WINDOW=window > 0, PACKED=start is not None, DESCRIBED=tiles.described, DK=of_k, DV=of_v,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    if splits > 1:
        for whole, part in zip((dk, dv), parts, strict=True):
            whole.copy_(part.sum(0))


def splits_of(group: int, programs: int, multiprocessors: int) -> int:
    """Parts of a group's heads, a divisor of their number: about two programs for every multiprocessor, for under
    causality the heaviest program is twice the average one. A little less is as good: 256 programs on 132 pair up."""
    wanted = cdiv(multiprocessors * 9, 5 * programs)
    return next((n for n in range(1, group) if group % n == 0 and n >= wanted), group)


def _launch_dq(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse2: torch.Tensor,
               delta: torch.Tensor, dq: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None,
               causal: bool, window: int, scale: float, tiles: Tiles) -> None:
    """Fills dq."""
    batch, heads, seq_q, d = q.shape
    kv_heads, seq_k = k.shape[1:3]
    group = heads // kv_heads
    section = group * max(1, L2_BYTES // (2 * seq_k * d * q.element_size()))
    _attn_bwd_dq[(batch * heads * cdiv(seq_q, tiles.block_m),)](
        source(q, tiles.block_m, tiles), source(k, tiles.block_n, tiles), source(v, tiles.block_n, tiles),
        source(dy, tiles.block_m, tiles), lse2, delta, dq, start, end, *(x.stride()[:3] for x in (q, k, v, dy, dq)),
        heads, group, batch * heads, seq_q, lse2.shape[-1], seq_k, window, section, scale * math.log2(math.e), scale,
        HEAD_DIM=d, BLOCK_D=block_d(d), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, CAUSAL=causal, WINDOW=window > 0,
        PACKED=start is not None, DESCRIBED=tiles.described, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
