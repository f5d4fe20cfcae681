"""The forward kernel of attention: y and the logarithm of each query's sum of exponentials.

A program holds a block of queries and goes over the blocks of keys that they see, keeping for each query the largest
score m so far, l = sum exp(s - m) and the unnormalised y (arXiv:2205.14135, algorithm 1; arXiv:2307.08691, algorithm
1). Scores are kept in units of log 2, so that exp is one instruction.

Blocks at the edges of what is seen come first, masked, then those seen whole. For these Hopper has a loop of its own:
the products of a warp group run beside its other instructions, but Triton waits for q k^T at once, and softmax needs
it; so an iteration multiplies the previous one's probabilities with their values while it computes its own.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.attention.bounds import block_range, edge_block, keys_of, schedule
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
from engine.kernels.language import cdiv, dot, jit, jit_counting, rounded, tl

LOG2_E = 1.4426950408889634


@jit
def _edges(acc, total, top, q, k, v, k_row, v_row, batch, head, begin, whole, broken, stop, first, last, keys, scale,
           D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, LOW: tl.constexpr, DESCRIBED: tl.constexpr):
    """The blocks that are not seen whole; LOW: the near edge of a window or document may be among them."""
    for index in range(0, stop - broken + whole - begin):
        row = (edge_block(index, begin, whole, broken) if LOW else broken + index) * KEYS
        tile = load_tile(k, batch, head, row, keys, k_row, D, WIDTH, KEYS, True, DESCRIBED)
        s = dot(q, tl.trans(tile), tl.zeros([q.shape[0], KEYS], tl.float32))
        at = row + tl.arange(0, KEYS)
        seen = at[None, :] <= last[:, None]
        if LOW:
            seen = seen & (at[None, :] >= first[:, None])
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen no key yet: exp(-inf), not NaN
        p = tl.exp2(s * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        tile = load_tile(v, batch, head, row, keys, v_row, D, WIDTH, KEYS, True, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
        top = new
    return acc, total, top


@jit
def _whole(acc, total, top, q, k, v, k_row, v_row, batch, head, whole, broken, keys, scale,
           D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, DESCRIBED: tl.constexpr):
    """The blocks that every query of the program sees."""
    for block in range(whole, broken):
        tile = load_tile(k, batch, head, block * KEYS, keys, k_row, D, WIDTH, KEYS, False, DESCRIBED)
        s = dot(q, tl.trans(tile), tl.zeros([q.shape[0], KEYS], tl.float32))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        tile = load_tile(v, batch, head, block * KEYS, keys, v_row, D, WIDTH, KEYS, False, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
        top = new
    return acc, total, top


@jit
def _whole_delayed(acc, total, top, q, k, v, k_row, v_row, batch, head, whole, broken, keys, scale,
                   D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, DESCRIBED: tl.constexpr):
    """The same; p and shrink are those of the block before, and the first product is with zeros.

    p stays in fp32 between iterations: carried in 16 bits, Triton would take it through shared memory.
    """
    p = tl.zeros([q.shape[0], KEYS], tl.float32)
    shrink = tl.full([q.shape[0]], 1.0, tl.float32)
    for block in range(whole, broken):
        tile = load_tile(k, batch, head, block * KEYS, keys, k_row, D, WIDTH, KEYS, False, DESCRIBED)
        s = dot(q, tl.trans(tile), tl.zeros([q.shape[0], KEYS], tl.float32))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        tile = load_tile(v, batch, head, tl.maximum(block - 1, whole) * KEYS, keys, v_row, D, WIDTH, KEYS, False,
                         DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
        p = tl.exp2(s * scale - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        top = new
    if whole < broken:
        tile = load_tile(v, batch, head, (broken - 1) * KEYS, keys, v_row, D, WIDTH, KEYS, False, DESCRIBED)
        acc = dot(rounded(p, tile.dtype), tile, acc * shrink[:, None])
    return acc, total, top


@jit_counting("heads", "group", "items", "seq", "keys", "window", "section")
def _forward(q, k, v, y, lse, start, end, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
             y_batch, y_head, y_row, heads, group, items, seq, keys, window, section, scale, D: tl.constexpr,
             WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
             PACKED: tl.constexpr, DESCRIBED: tl.constexpr, DELAYED: tl.constexpr):
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
    kv_head = head // group
    k = head_of(k, batch, kv_head, k_batch, k_head, DESCRIBED)
    v = head_of(v, batch, kv_head, v_batch, v_head, DESCRIBED)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    acc, total, top = _edges(acc, total, top, queries, k, v, k_row, v_row, batch, kv_head, begin, whole, broken, stop,
                             first, last, keys, scale, D, WIDTH, KEYS, WINDOW or PACKED, DESCRIBED)
    if DELAYED:
        acc, total, top = _whole_delayed(acc, total, top, queries, k, v, k_row, v_row, batch, kv_head, whole, broken,
                                         keys, scale, D, WIDTH, KEYS, DESCRIBED)
    else:
        acc, total, top = _whole(acc, total, top, queries, k, v, k_row, v_row, batch, kv_head, whole, broken, keys,
                                 scale, D, WIDTH, KEYS, DESCRIBED)

    some = total > 0.0
    total = tl.where(some, total, 1.0)  # a query that sees nothing: its acc is 0
    acc = acc * (1.0 / total)[:, None]
    value = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + item.to(tl.int64) * seq + rows, value, mask=rows < seq)
    store_tile(head_of(y, batch, head, y_batch, y_head, False), row, seq, y_row, acc, D, WIDTH, QUERIES)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None,
            causal: bool, window: int, scale: float, tiles: Tiles | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q [batch, heads, seq, d], k and v [batch, kv_heads, keys, d] -> (y [batch, heads, seq, d], laid out [batch, seq,
    heads, d], and lse [batch, heads, seq] in fp32: natural logarithms, -inf where a query sees nothing).

    `start` and `end` are those of document_bounds or None; `window` 0 is none. Strides are free but for the last, which
    is made 1 by a copy if need be.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, seq, d = q.shape
    kv_heads, keys = k.shape[1:3]
    y = q.new_empty(batch, seq, heads, d).transpose(1, 2)
    lse = q.new_empty(batch, heads, seq, dtype=torch.float32)
    if q.numel() == 0 or keys == 0:
        return y.zero_(), lse.fill_(float("-inf"))
    tiles = tiles or tiles_for("forward", q, k, v)
    group = heads // kv_heads
    section = group * max(1, L2_BYTES // (2 * keys * d * q.element_size()))

    def source(x: torch.Tensor, rows: int) -> Any:
        return describe(x, [1, 1, rows, width_of(d)]) if tiles.described else x

    _forward[(batch * heads * cdiv(seq, tiles.queries),)](
        source(q, tiles.queries), source(k, tiles.keys), source(v, tiles.keys), y, lse, start, end,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], heads, group, batch * heads, seq, keys,
        window, section, scale * LOG2_E, D=d, WIDTH=width_of(d), QUERIES=tiles.queries, KEYS=tiles.keys, CAUSAL=causal,
        WINDOW=window > 0, PACKED=start is not None, DESCRIBED=tiles.described, DELAYED=tiles.delayed,
        num_warps=tiles.warps, num_stages=tiles.stages)
    return y, lse
