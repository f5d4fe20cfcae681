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

from typing import Any

import torch

from engine.kernels.attention.bounds import block_range, edge_block, keys_of, queries_of, schedule
from engine.kernels.attention.tiles import (
    L2_BYTES,
    Tiles,
    describe,
    head_of,
    load_tile,
    store_tile,
    tiles_for,
    width_of,
)
from engine.kernels.language import cdiv, dot, jit, jit_counting, processors, rounded, tl

LOG2_E = 1.4426950408889634
ROWS = 128
"""Rows of a program of the statistics kernel, and what statistics are padded to: no tile of queries is longer, so that
they are loaded without masks."""


@jit_counting("heads", "seq")
def _statistics(y, dy, lse, dlse, top, delta, y_batch, y_head, y_row, dy_batch, dy_head, dy_row, heads, seq,
                D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LSE: tl.constexpr):
    """delta, and lse in units of log 2, +inf where a query sees nothing: its probabilities come out as exp(-inf)."""
    item = tl.program_id(1)
    batch = item // heads
    head = item % heads
    row = tl.program_id(0) * ROWS
    out = load_tile(head_of(y, batch, head, y_batch, y_head, False), batch, head, row, seq, y_row, D, WIDTH, ROWS, True,
                    False)
    grad = load_tile(head_of(dy, batch, head, dy_batch, dy_head, False), batch, head, row, seq, dy_row, D, WIDTH, ROWS,
                     True, False)
    rows = row + tl.arange(0, ROWS)
    at = item.to(tl.int64) * seq + rows
    value = tl.load(lse + at, mask=rows < seq, other=float("-inf"))
    value = tl.where(value == float("-inf"), float("inf"), value * 1.4426950408889634)
    product = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if LSE:
        product -= tl.load(dlse + at, mask=rows < seq, other=0.0)
    at = item.to(tl.int64) * (tl.num_programs(0) * ROWS) + rows
    tl.store(top + at, value)
    tl.store(delta + at, product)


@jit
def _load_statistic(x, item, row, length, ROWS: tl.constexpr, DESCRIBED: tl.constexpr):
    """[ROWS] of an item's `length` numbers."""
    if DESCRIBED:
        return x.load([item, row]).reshape(ROWS)
    else:
        return tl.load(x + item.to(tl.int64) * length + row + tl.arange(0, ROWS))


@jit
def _query_blocks(dk_acc, dv_acc, keys_tile, values_tile, q, dy, top, delta, q_batch, q_head, q_row, dy_batch, dy_head,
                  dy_row, batch, head, item, turns, begin, whole, broken, stop, key, seq, keys, window, start, end,
                  length, scale, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr,
                  WINDOW: tl.constexpr, PACKED: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
                  DK: tl.constexpr, DV: tl.constexpr):
    """Adds what `turns` heads from `head` on give to the keys from `key` on, by the edges (EDGE) or by what is seen
    whole.

    The turns and blocks are one loop, so that the pipeline is filled once. `item` is head's place in statistics.
    """
    count = (stop - broken + whole - begin) if EDGE else (broken - whole)
    for index in range(0, turns * count):
        turn = index // count
        block = index % count
        row = (edge_block(block, begin, whole, broken) if EDGE else whole + block) * QUERIES
        queries = load_tile(head_of(q, batch, head + turn, q_batch, q_head, DESCRIBED), batch, head + turn, row, seq,
                            q_row, D, WIDTH, QUERIES, EDGE, DESCRIBED)
        s = dot(keys_tile, tl.trans(queries), tl.zeros([keys_tile.shape[0], QUERIES], tl.float32))
        grad = load_tile(head_of(dy, batch, head + turn, dy_batch, dy_head, DESCRIBED), batch, head + turn, row, seq,
                         dy_row, D, WIDTH, QUERIES, EDGE, DESCRIBED)
        highest = _load_statistic(top, item + turn, row, length, QUERIES, DESCRIBED)
        if DK:
            dp = dot(values_tile, tl.trans(grad), tl.zeros([keys_tile.shape[0], QUERIES], tl.float32))
        p = tl.exp2(s * scale - highest[None, :])
        if EDGE:
            # Made anew for each of the few blocks at an edge: held through the loop they would be registers too many.
            at = tl.minimum(key + tl.arange(0, keys_tile.shape[0]), keys - 1)
            first, last = queries_of(at, seq, keys, window, start, end, CAUSAL, WINDOW, PACKED)
            rows = row + tl.arange(0, QUERIES)
            seen = rows[None, :] >= first[:, None]
            if WINDOW or PACKED:
                seen = seen & (rows[None, :] <= last[:, None])
            p = tl.where(seen, p, 0.0)
        # Both operands are made before either product begins: registers that a product reads may not be written while
        # another runs, or the assembler lets each one finish before the next.
        if DK:
            mean = _load_statistic(delta, item + turn, row, length, QUERIES, DESCRIBED)
            ds = rounded(p * (dp - mean[None, :]), queries.dtype)
        if DV:
            dv_acc = dot(rounded(p, grad.dtype), grad, dv_acc)
        if DK:
            dk_acc = dot(ds, queries, dk_acc)
    return dk_acc, dv_acc


@jit_counting("kv_heads", "group", "splits", "items", "seq", "length", "keys", "window", "section")
def _backward_keys(q, k, v, dy, top, delta, dk, dv, start, end, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
                   v_head, v_row, dy_batch, dy_head, dy_row, d_split, d_batch, d_head, d_row, kv_heads, group, splits,
                   items, seq, length, keys, window, section, scale2, scale, D: tl.constexpr, WIDTH: tl.constexpr,
                   QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                   PACKED: tl.constexpr, DESCRIBED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    item, block = schedule(tl.program_id(0), items, tl.cdiv(keys, KEYS), section, False)
    split = item % splits
    batch = item // splits // kv_heads
    kv_head = item // splits % kv_heads
    key = block * KEYS
    if PACKED:
        start += batch * seq
        end += batch * seq
    low_first, high_first = queries_of(key, seq, keys, window, start, end, CAUSAL, WINDOW, PACKED)
    low_last, high_last = queries_of(tl.minimum(key + KEYS, keys) - 1, seq, keys, window, start, end, CAUSAL, WINDOW,
                                     PACKED)
    begin, whole, broken, stop = block_range(low_first, low_last, high_first, high_last, QUERIES)

    keys_tile = load_tile(head_of(k, batch, kv_head, k_batch, k_head, DESCRIBED), batch, kv_head, key, keys, k_row, D,
                          WIDTH, KEYS, True, DESCRIBED)
    values_tile = keys_tile
    if DK:
        values_tile = load_tile(head_of(v, batch, kv_head, v_batch, v_head, DESCRIBED), batch, kv_head, key, keys,
                                v_row, D, WIDTH, KEYS, True, DESCRIBED)
    dk_acc = tl.zeros([KEYS, WIDTH if DK else 16], tl.float32)
    dv_acc = tl.zeros([KEYS, WIDTH if DV else 16], tl.float32)
    turns = group // splits
    head = kv_head * group + split * turns
    row_of_head = batch * kv_heads * group + head
    dk_acc, dv_acc = _query_blocks(dk_acc, dv_acc, keys_tile, values_tile, q, dy, top, delta, q_batch, q_head, q_row,
                                   dy_batch, dy_head, dy_row, batch, head, row_of_head, turns, begin, whole, broken,
                                   stop, key, seq, keys, window, start, end, length, scale2, D, WIDTH, QUERIES, CAUSAL,
                                   WINDOW, PACKED, True, DESCRIBED, DK, DV)
    dk_acc, dv_acc = _query_blocks(dk_acc, dv_acc, keys_tile, values_tile, q, dy, top, delta, q_batch, q_head, q_row,
                                   dy_batch, dy_head, dy_row, batch, head, row_of_head, turns, begin, whole, broken,
                                   stop, key, seq, keys, window, start, end, length, scale2, D, WIDTH, QUERIES, CAUSAL,
                                   WINDOW, PACKED, False, DESCRIBED, DK, DV)
    offset = split.to(tl.int64) * d_split
    if DK:
        store_tile(head_of(dk + offset, batch, kv_head, d_batch, d_head, False), key, keys, d_row, dk_acc * scale, D,
                   WIDTH, KEYS)
    if DV:
        store_tile(head_of(dv + offset, batch, kv_head, d_batch, d_head, False), key, keys, d_row, dv_acc, D, WIDTH,
                   KEYS)


@jit
def _key_blocks(acc, queries, grad, highest, mean, k, v, k_row, v_row, batch, head, begin, whole, broken, stop, first,
                last, keys, scale, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
                DESCRIBED: tl.constexpr):
    """Adds what blocks of keys give to dq, by the edges (EDGE) or by what is seen whole."""
    for index in range(0, (stop - broken + whole - begin) if EDGE else (broken - whole)):
        row = (edge_block(index, begin, whole, broken) if EDGE else whole + index) * KEYS
        keys_tile = load_tile(k, batch, head, row, keys, k_row, D, WIDTH, KEYS, EDGE, DESCRIBED)
        s = dot(queries, tl.trans(keys_tile), tl.zeros([queries.shape[0], KEYS], tl.float32))
        values = load_tile(v, batch, head, row, keys, v_row, D, WIDTH, KEYS, EDGE, DESCRIBED)
        dp = dot(grad, tl.trans(values), tl.zeros([queries.shape[0], KEYS], tl.float32))
        p = tl.exp2(s * scale - highest[:, None])
        if EDGE:
            at = row + tl.arange(0, KEYS)
            p = tl.where((at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None]), p, 0.0)
        ds = p * (dp - mean[:, None])
        acc = dot(rounded(ds, keys_tile.dtype), keys_tile, acc)
    return acc


@jit_counting("heads", "group", "items", "seq", "length", "keys", "window", "section")
def _backward_queries(q, k, v, dy, top, delta, dq, start, end, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
                      v_head, v_row, dy_batch, dy_head, dy_row, d_batch, d_head, d_row, heads, group, items, seq,
                      length, keys, window, section, scale2, scale, D: tl.constexpr, WIDTH: tl.constexpr,
                      QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                      PACKED: tl.constexpr, DESCRIBED: tl.constexpr):
    item, block = schedule(tl.program_id(0), items, tl.cdiv(seq, QUERIES), section, CAUSAL)
    batch = item // heads
    head = item % heads
    row = block * QUERIES
    if PACKED:
        start += batch * seq
        end += batch * seq
    rows = row + tl.arange(0, QUERIES)
    first, last = keys_of(tl.minimum(rows, seq - 1), seq, keys, window, start, end, CAUSAL, WINDOW, PACKED)
    low_first, high_first = keys_of(row, seq, keys, window, start, end, CAUSAL, WINDOW, PACKED)
    low_last, high_last = keys_of(tl.minimum(row + QUERIES, seq) - 1, seq, keys, window, start, end, CAUSAL, WINDOW,
                                  PACKED)
    begin, whole, broken, stop = block_range(low_first, low_last, high_first, high_last, KEYS)

    queries = load_tile(head_of(q, batch, head, q_batch, q_head, DESCRIBED), batch, head, row, seq, q_row, D, WIDTH,
                        QUERIES, True, DESCRIBED)
    grad = load_tile(head_of(dy, batch, head, dy_batch, dy_head, DESCRIBED), batch, head, row, seq, dy_row, D, WIDTH,
                     QUERIES, True, DESCRIBED)
    highest = _load_statistic(top, item, row, length, QUERIES, False)
    mean = _load_statistic(delta, item, row, length, QUERIES, False)
    kv_head = head // group
    k = head_of(k, batch, kv_head, k_batch, k_head, DESCRIBED)
    v = head_of(v, batch, kv_head, v_batch, v_head, DESCRIBED)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    acc = _key_blocks(acc, queries, grad, highest, mean, k, v, k_row, v_row, batch, kv_head, begin, whole, broken, stop,
                      first, last, keys, scale2, D, WIDTH, KEYS, True, DESCRIBED)
    acc = _key_blocks(acc, queries, grad, highest, mean, k, v, k_row, v_row, batch, kv_head, begin, whole, broken, stop,
                      first, last, keys, scale2, D, WIDTH, KEYS, False, DESCRIBED)
    store_tile(head_of(dq, batch, head, d_batch, d_head, False), row, seq, d_row, acc * scale, D, WIDTH, QUERIES)


def backward(dy: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             y: torch.Tensor, lse: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, causal: bool,
             window: int, scale: float, tiles: tuple[Tiles, Tiles] | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v, laid out [batch, seq, heads, d]; arguments as those and the results of
    forward, dy like y, dlse like lse or None. Strides are free but for the last."""
    q, k, v, y, dy = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, y, dy))
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                  for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    top, delta = _launch_statistics(dy, dlse, y, lse)
    for_keys, for_queries = tiles or (tiles_for("keys", q, k, v, dy), tiles_for("queries", q, k, v, dy))
    _launch_keys(dy, q, k, v, top, delta, dk, dv, start, end, causal, window, scale, for_keys)
    _launch_queries(dy, q, k, v, top, delta, dq, start, end, causal, window, scale, for_queries)
    return dq, dk, dv


def _launch_statistics(dy: torch.Tensor, dlse: torch.Tensor | None, y: torch.Tensor,
                       lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """lse in units of log 2 and delta, both [batch * heads, seq rounded up to ROWS] in fp32."""
    batch, heads, seq, d = y.shape
    blocks = cdiv(seq, ROWS)
    top, delta = (lse.new_empty(batch * heads, blocks * ROWS) for _ in range(2))
    _statistics[(blocks, batch * heads)](
        y, dy, lse, None if dlse is None else dlse.contiguous(), top, delta, *y.stride()[:3], *dy.stride()[:3], heads,
        seq, D=d, WIDTH=width_of(d), ROWS=ROWS, LSE=dlse is not None,
        num_warps=4 if width_of(d) <= 128 else 8)  # 256 columns by 4 warps spill on sm_120
    return top, delta


def _launch_keys(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top: torch.Tensor,
                 delta: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, start: torch.Tensor | None,
                 end: torch.Tensor | None, causal: bool, window: int, scale: float, tiles: Tiles) -> None:
    """Fills dk and dv. Where there are too few blocks of keys for the multiprocessors the heads of a group are split
    over programs, whose sums are added in a fixed order."""
    batch, heads, seq, d = q.shape
    kv_heads, keys = k.shape[1:3]
    group, blocks = heads // kv_heads, cdiv(keys, tiles.keys)
    splits = splits_of(group, batch * kv_heads * blocks, processors(q.device))
    parts = [x if splits == 1 else x.new_empty(splits, batch, keys, kv_heads, d, dtype=torch.float32).transpose(2, 3)
             for x in (dk, dv)]
    strides = (0, *dk.stride()[:3]) if splits == 1 else parts[0].stride()[:4]
    section = splits * max(1, L2_BYTES // (2 * group * seq * d * q.element_size()))

    def source(x: torch.Tensor, rows: int) -> Any:
        return describe(x, [1, 1, rows, width_of(d)]) if tiles.described else x

    def statistic(x: torch.Tensor) -> Any:
        return describe(x, [1, tiles.queries]) if tiles.described else x

    # Accumulators of 256 columns for both gradients are more than registers hold: each by itself then, s twice.
    for of_k, of_v in ((True, True),) if width_of(d) <= 128 else ((True, False), (False, True)):
        _backward_keys[(batch * kv_heads * splits * blocks,)](
            source(q, tiles.queries), source(k, tiles.keys), source(v, tiles.keys), source(dy, tiles.queries),
            statistic(top), statistic(delta), *parts, start, end, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *dy.stride()[:3], *strides, kv_heads, group, splits, batch * kv_heads * splits, seq, top.shape[-1], keys,
            window, section, scale * LOG2_E, scale, D=d, WIDTH=width_of(d), QUERIES=tiles.queries, KEYS=tiles.keys,
            CAUSAL=causal, WINDOW=window > 0, PACKED=start is not None, DESCRIBED=tiles.described, DK=of_k, DV=of_v,
            num_warps=tiles.warps, num_stages=tiles.stages)
    if splits > 1:
        for whole, part in zip((dk, dv), parts, strict=True):
            whole.copy_(part.sum(0))


def splits_of(group: int, programs: int, multiprocessors: int) -> int:
    """Parts of a group's heads, a divisor of their number: about two programs for every multiprocessor, for under
    causality the heaviest program is twice the average one. A little less is as good: 256 programs on 132 pair up."""
    wanted = cdiv(multiprocessors * 9, 5 * programs)
    return next((n for n in range(1, group) if group % n == 0 and n >= wanted), group)


def _launch_queries(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top: torch.Tensor,
                    delta: torch.Tensor, dq: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None,
                    causal: bool, window: int, scale: float, tiles: Tiles) -> None:
    """Fills dq."""
    batch, heads, seq, d = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    section = group * max(1, L2_BYTES // (2 * keys * d * q.element_size()))

    def source(x: torch.Tensor, rows: int) -> Any:
        return describe(x, [1, 1, rows, width_of(d)]) if tiles.described else x

    _backward_queries[(batch * heads * cdiv(seq, tiles.queries),)](
        source(q, tiles.queries), source(k, tiles.keys), source(v, tiles.keys), source(dy, tiles.queries), top, delta,
        dq, start, end, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3], *dq.stride()[:3], heads,
        group, batch * heads, seq, top.shape[-1], keys, window, section, scale * LOG2_E, scale, D=d, WIDTH=width_of(d),
        QUERIES=tiles.queries, KEYS=tiles.keys, CAUSAL=causal, WINDOW=window > 0, PACKED=start is not None,
        DESCRIBED=tiles.described, num_warps=tiles.warps, num_stages=tiles.stages)
