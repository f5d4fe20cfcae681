"""Rotary position embedding (RoFormer, arXiv:2104.09864) in Llama's half rotation.

With x = [x1, x2] split in the middle of a head: y = [x1 cos - x2 sin, x2 cos + x1 sin], cos and sin of position times
frequency theta^(-2i/d). The backward is the inverse rotation. Angles are made in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.norm import wide


def rope_table(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """cos and sin [seq, head_dim / 2] of `positions` [seq], in fp32 (fp64 where the model is fp64)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = torch.outer(positions.to(torch.float64), theta ** -exponent)
    return angles.cos().to(wide(dtype)), angles.sin().to(wide(dtype))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float, out: torch.Tensor) -> None:
    """out = x rotated by the angles (sign 1) or back (sign -1); [batch, seq, heads, head_dim], out may be x."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [seq, 1, head_dim / 2]
    a, b = x[..., :half].to(cos.dtype), x[..., half:].to(cos.dtype)
    first = (a * cos).addcmul_(b, sin, value=-sign)
    out[..., half:] = (b * cos).addcmul_(a, sin, value=sign)
    out[..., :half] = first


class _RopeSplit(torch.autograd.Function):
    """Rotation in place and the split into q, k, v in one, so that the backward writes one gradient and copies none."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int,
                kv_heads: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        turned = qkv[:, :, : heads + kv_heads]
        _rotate(turned, cos, sin, 1.0, out=turned)
        q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        q, k, v = (grad.transpose(1, 2) for grad in grads)  # [batch, seq, heads, head_dim]
        heads, kv_heads = q.shape[2], k.shape[2]
        grad = q.new_empty(*q.shape[:2], heads + 2 * kv_heads, q.shape[3])
        _rotate(q, cos, sin, -1.0, out=grad[:, :, :heads])
        _rotate(k, cos, sin, -1.0, out=grad[:, :, heads : heads + kv_heads])
        grad[:, :, heads + kv_heads :] = v
        return grad, None, None, None, None


def rope_split(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int,
               kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Rotates q and k in the memory of qkv [batch, seq, heads + 2 kv_heads, head_dim] and gives views of it: q [batch,
    heads, seq, head_dim], k and v [batch, kv_heads, seq, head_dim]. cos, sin [seq, head_dim / 2].

    qkv's values are used up; nothing else may need them.
    """
    return _RopeSplit.apply(qkv, cos, sin, heads, kv_heads)  # type: ignore[no-any-return]
