"""Causal attention with grouped queries: y = softmax(scale q k^T + mask) v.

Query head j reads key/value head j // (heads / kv_heads).
"""

from __future__ import annotations

import torch

from engine.kernels.attention.reference import reference, sdpa

__all__ = ["attention"]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, by: str = "sdpa",
              implementation: str | None = None) -> torch.Tensor:
    """q [batch, heads, seq, d], k and v [batch, kv_heads, keys, d] -> [batch, heads, seq, d].

    With `causal`, query i sees the keys up to keys - seq + i (the last queries of a longer sequence).
    """
    return (reference if (implementation or by) == "reference" else sdpa)(q, k, v, causal)
