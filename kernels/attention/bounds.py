"""Which keys a query sees, as an interval; causality, windows, documents and the ends of tensors are all made of it.

A query sees the keys first..last, a key is seen by the queries first..last, and both ends never fall as the position
grows. So of the blocks of keys that a block of queries sees, those in the middle are seen whole and need no mask,
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
def key_range(query, seq_q, seq_k, window, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
              PACKED: tl.constexpr):
    """First and last key that queries (numbers or a tensor of them, all below seq_q) see; none where last < first.

    `start` and `end` point to the batch row's part of document_bounds, where PACKED; then seq_q == seq_k.
    """
    first = query * 0
    last = query + (seq_k - seq_q) if CAUSAL else first + (seq_k - 1)
    if WINDOW:
        first = tl.maximum(first, query + (seq_k - seq_q) - window + 1)
    if PACKED:
        first = tl.maximum(first, tl.load(start + query))
        if not CAUSAL:
            last = tl.load(end + query) - 1
    return first, last


@jit
def query_range(key, seq_q, seq_k, window, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                PACKED: tl.constexpr):
    """First and last query that sees keys (all below seq_k); none where last < first."""
    first = tl.maximum(key - (seq_k - seq_q), 0) if CAUSAL else key * 0
    last = key * 0 + (seq_q - 1)
    if WINDOW:
        last = tl.minimum(last, key - (seq_k - seq_q) + window - 1)
    if PACKED:
        last = tl.minimum(last, tl.load(end + key) - 1)
        if not CAUSAL:
            first = tl.load(start + key)
    return first, last


@jit
def block_range(low_first, low_last, high_first, high_last, BLOCK: tl.constexpr):
    """What rows see, in blocks of BLOCK: (n_min, full_min, full_max, n_max). All see the whole of [full_min, full_max);
    the edges [n_min, full_min) and [full_max, n_max) are to be masked.

    low: first position seen by the first and by the last row; high: last positions.
    """
    n_min = low_first // BLOCK
    n_max = tl.maximum(n_min, tl.cdiv(tl.maximum(high_last + 1, 0), BLOCK))
    full_min = tl.minimum(tl.cdiv(low_last, BLOCK), n_max)
    full_max = tl.minimum(tl.maximum(tl.maximum(high_first + 1, 0) // BLOCK, full_min), n_max)
    return n_min, full_min, full_max, n_max


@jit
def keys_of_block(start_m, seq_q, seq_k, window, start, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """What BLOCK_M queries from start_m on see: each one's first and last key, as in key_range, and the blocks of
    BLOCK_N keys, as in block_range."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    key_first, key_last = key_range(tl.minimum(offs_m, seq_q - 1), seq_q, seq_k, window, start, end, CAUSAL, WINDOW,
                                    PACKED)
    low_first, high_first = key_range(start_m, seq_q, seq_k, window, start, end, CAUSAL, WINDOW, PACKED)
    low_last, high_last = key_range(tl.minimum(start_m + BLOCK_M, seq_q) - 1, seq_q, seq_k, window, start, end, CAUSAL,
                                    WINDOW, PACKED)
    n_min, full_min, full_max, n_max = block_range(low_first, low_last, high_first, high_last, BLOCK_N)
    return key_first, key_last, n_min, full_min, full_max, n_max


@jit
def edge_block(index, n_min, full_min, full_max):
    """The index-th of the blocks [n_min, full_min) and [full_max, n_max), so that one loop goes over both edges."""
    return tl.where(index < full_min - n_min, n_min + index, full_max + index - (full_min - n_min))


@jit
def schedule(pid, items, blocks, section, DESCENDING: tl.constexpr):
    """The item (a head of a batch row) and the block of a program: heaviest first, so that the light ones fill the end.

    Items go in sections whose keys and values the L2 cache holds; in one, all items of a block are neighbours, and the
    heads of one kv group among them. DESCENDING: later blocks are the heavier ones.
    """
    number = pid // (section * blocks)
    rest = pid % (section * blocks)
    size = tl.minimum(section, items - number * section)
    block = rest // size
    item = number * section + rest % size
    return item, blocks - 1 - block if DESCENDING else block
