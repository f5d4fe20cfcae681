"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) over the last dim.

RMSNorm: y = w x / rms(x), rms(x) = sqrt(mean(x^2) + eps). With xhat = x / rms(x) and g the gradient of y:
gw = sum over rows of g xhat;  gx = (g w - xhat mean(g w xhat)) / rms(x).
Statistics are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        xw = x.to(wide(x.dtype))
        norm = torch.linalg.vector_norm(xw, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (xw * rstd).mul_(weight.to(xw.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        rows = x.to(rstd.dtype).reshape(-1, width)
        g, r = grad.to(rstd.dtype).reshape(-1, width), rstd.reshape(-1, 1)
        w = weight.to(rstd.dtype)
        product = g * rows  # two matrix-vector products of it give both sums: few passes over memory
        grad_weight = (product.t() @ r).squeeze(-1)
        mean = (product @ w).unsqueeze(-1).mul_(r.pow(3)).div_(width)  # [rows, 1]
        grad_x = torch.mul(g, w, out=product).mul_(r).addcmul_(rows, mean, value=-1)
        return grad_x.view_as(x).to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., width], weight [width] -> [..., width]."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


class _LayerNorm(torch.autograd.Function):
    """LayerNorm computed in fp32 whatever its input; it keeps x as it came, and the two statistics of each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        kind = wide(x.dtype)
        y, mean, rstd = torch.native_layer_norm(x.to(kind), x.shape[-1:], weight.to(kind), bias.to(kind), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        kind = rstd.dtype
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.to(kind), x.to(kind), x.shape[-1:], mean, rstd, weight.to(kind), bias.to(kind), [True] * 3)
        return grads[0].to(x.dtype), grads[1].to(weight.dtype), grads[2].to(bias.dtype), None


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., width], weight and bias [width] -> [..., width].

    On a CPU torch sums the gradients of weight and bias in the dtype they have: over 4,096 rows of bf16 half of a bias'
    gradient is lost. Its CUDA kernel sums in fp32.
    """
    if x.is_cuda:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
