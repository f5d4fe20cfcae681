"""Attention in plain PyTorch: torch's fused SDPA, and the formula itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Torch's scaled_dot_product_attention."""
    grouped = q.shape[1] != k.shape[1]
    if causal and q.shape[2] not in (1, k.shape[2]):
        mask = _causal_mask(q.shape[2], k.shape[2], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=grouped)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The formula, written out; scores never below fp32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])  # [batch, heads, seq, keys]
    if causal:
        scores = scores.masked_fill(~_causal_mask(q.shape[2], k.shape[2], q.device), float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v


def _causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys], True where a query may look."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
