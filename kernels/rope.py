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


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> None:
    """Rotates x [batch, seq, heads, head_dim] in place by the angles (sign 1) or back (sign -1)."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [seq, 1, head_dim / 2]
    first, second = x[..., :half], x[..., half:]
    a, b = first.to(cos.dtype), second.to(cos.dtype)
    rotated = (a * cos).addcmul_(b, sin, value=-sign)
    second.copy_((b * cos).addcmul_(a, sin, value=sign))
    first.copy_(rotated)


class _RopeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        _rotate(x[..., :heads, :], cos, sin, 1.0)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)  # never into the gradient itself
        _rotate(grad[..., : ctx.heads, :], cos, sin, -1.0)
        return grad, None, None, None


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotates the first `heads` heads of x [batch, seq, all heads, head_dim] in place; cos, sin [seq, head_dim / 2]."""
    return _RopeInPlace.apply(x, cos, sin, heads)  # type: ignore[no-any-return]
