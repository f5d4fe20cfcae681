"""Attention in plain PyTorch: torch's fused SDPA, and the formula itself.

Shapes are those of `attention`. Masks are made whole, [queries, keys]: the kernels beside this file never do that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels.attention.documents import Documents
from engine.kernels.language import wide
from engine.kernels.softmax import scaled_masked_softmax


def seen(q: torch.Tensor, k: torch.Tensor, causal: bool, window: int | None,
         documents: Documents | None) -> torch.Tensor | None:
    """True where a query may look, [batch or 1, 1, seq, keys]; None where it may look everywhere."""
    (batch, _, seq, _), keys = q.shape, k.shape[2]
    ahead = torch.arange(keys, device=q.device) - torch.arange(keys - seq, keys, device=q.device).unsqueeze(1)
    mask = None
    if causal:
        mask = ahead <= 0
    if window is not None:
        mask = ahead > -window if mask is None else mask & (ahead > -window)
    if documents is not None:
        start = documents.start.view(batch, 1, seq)
        same = start.unsqueeze(-1) == start.unsqueeze(-2)  # [batch, 1, seq, seq]
        mask = same if mask is None else same & mask
    return mask if mask is None or mask.dim() == 4 else mask[None, None]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None = None,
         documents: Documents | None = None, scale: float | None = None) -> torch.Tensor:
    """Torch's scaled_dot_product_attention, which knows causality itself where queries and keys are as many."""
    grouped = q.shape[1] != k.shape[1]
    one = q.shape[2] == 1 and causal  # the last of the keys' positions sees them all
    if window is None and documents is None and (not causal or one or q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and not one, scale=scale, enable_gqa=grouped)
    mask = seen(q, k, causal, window, documents)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if mask is not None and k.shape[2] < q.shape[2]:  # queries before the first key
        y = y.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return y


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None = None,
              documents: Documents | None = None, scale: float | None = None, softmax: str = "torch") -> torch.Tensor:
    """The formula, written out; the softmax, by "torch" or "triton", never below fp32, and 0 where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2)  # [batch, heads, seq, keys]
    return scaled_masked_softmax(scores, scale or q.shape[-1] ** -0.5,
                                 mask=seen(q, k, causal, window, documents), by=softmax) @ v


def statistics(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None = None,
               documents: Documents | None = None, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the logarithm of each query's sum of exponentials [batch, heads, seq], -inf where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    y = reference(q, k, v, causal, window, documents, scale)
    scores = (q @ k.repeat_interleave(group, dim=1).transpose(-1, -2)).to(wide(q.dtype)) * (
        scale or q.shape[-1] ** -0.5)
    mask = seen(q, k, causal, window, documents)
    if mask is None:
        return y, torch.logsumexp(scores, -1)
    # A row of -inf alone would have no gradient: it is taken out and put back.
    some = mask.any(-1)
    lse = torch.logsumexp(scores.masked_fill(~(mask | ~some.unsqueeze(-1)), float("-inf")), -1)
    return y, lse.masked_fill(~some, float("-inf"))
