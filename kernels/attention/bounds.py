"""Which keys a query sees, as an interval; causality, windows, documents and the ends of tensors are all made of it.

A query at `row` sees the keys first..last, a key is seen by the queries first..last, and both ends never fall as the
row grows. So of the blocks of keys that a block of queries sees, those in the middle are seen whole and need no mask,
and those outside are never loaded: work is proportional to what is seen. Two numbers of each query's or key's document
suffice, made on the device from the cumulative lengths, and nothing is read back.
"""

from __future__ import annotations

import torch

from engine.kernels.language import jit, tl


def document_bounds(cumulative: torch.Tensor, batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First position of each token's document in its row, and one past the last: two int32 [batch * seq].

    `cumulative` [documents + 1] counts over the flattened batch, 0 first, and never falls. A document that goes over
    the end of a row is cut there; tokens after cumulative[-1] are a document by themselves.
    """
    tokens = torch.arange(batch * seq, device=cumulative.device)
    edges = torch.cat([cumulative.long(), tokens.new_full((1,), batch * seq)])
    after = torch.searchsorted(edges[:-1].contiguous(), tokens, right=True)  # documents of no length are passed over
    row = tokens // seq * seq
    start = (edges[after - 1] - row).clamp_(min=0)
    end = (edges[after] - row).clamp_(max=seq)
    return start.int(), end.int()


@jit
def keys_of(row, seq, keys, window, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """First and last key that queries (numbers or a tensor of rows, all below seq) see; none where last < first.

    `start` and `end` point to the batch row's part of document_bounds, where PACKED; then seq == keys.
    """
    first = row * 0
    last = row + (keys - seq) if CAUSAL else first + (keys - 1)
    if WINDOW:
        first = tl.maximum(first, row + (keys - seq) - window + 1)
    if PACKED:
        first = tl.maximum(first, tl.load(start + row))
        if not CAUSAL:
            last = tl.load(end + row) - 1
    return first, last


@jit
def queries_of(key, seq, keys, window, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """First and last query that sees keys (all below `keys`); none where last < first."""
    first = tl.maximum(key - (keys - seq), 0) if CAUSAL else key * 0
    last = key * 0 + (seq - 1)
    if WINDOW:
        last = tl.minimum(last, key - (keys - seq) + window - 1)
    if PACKED:
        last = tl.minimum(last, tl.load(end + key) - 1)
        if not CAUSAL:
            first = tl.load(start + key)
    return first, last


@jit
def block_range(low_first, low_last, high_first, high_last, SIZE: tl.constexpr):
    """What is seen, in blocks of SIZE: (begin, whole, broken, stop), of which [whole, broken) is seen by everyone.

    low: first position seen by the first and by the last row; high: last positions. Edges to be masked are
    [begin, whole) and [broken, stop).
    """
    begin = low_first // SIZE
    stop = tl.maximum(begin, tl.cdiv(tl.maximum(high_last + 1, 0), SIZE))
    whole = tl.minimum(tl.cdiv(low_last, SIZE), stop)
    broken = tl.minimum(tl.maximum(tl.maximum(high_first + 1, 0) // SIZE, whole), stop)
    return begin, whole, broken, stop


@jit
def edge_block(index, begin, whole, broken):
    """The index-th of the blocks [begin, whole) and [broken, stop), so that one loop goes over both edges."""
    return tl.where(index < whole - begin, begin + index, broken + index - (whole - begin))


@jit
def schedule(program, items, blocks, section, DESCENDING: tl.constexpr):
    """The item (a head of a batch row) and the block of a program: heaviest first, so that the light ones fill the end.

    Items go in sections whose keys and values the L2 cache holds; in one, all items of a block are neighbours, and the
    heads of one kv group among them. DESCENDING: later blocks are the heavier ones.
    """
    number = program // (section * blocks)
    rest = program % (section * blocks)
    size = tl.minimum(section, items - number * section)
    block = rest // size
    item = number * section + rest % size
    return item, blocks - 1 - block if DESCENDING else block
