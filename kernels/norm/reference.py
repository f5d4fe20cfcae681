"""The norms in plain PyTorch, with backward passes of few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.language import wide


class RMSNorm(torch.autograd.Function):
    """RMSNorm of (x, weight, eps), in fp32 whatever its input (fp64 for fp64)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        xw = x.to(wide(x.dtype))
        norm = torch.linalg.vector_norm(xw, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (xw * rstd).mul_(weight.to(xw.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
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


class LayerNorm(torch.autograd.Function):
    """Computed in fp32 whatever its input; it keeps x as it came, and two statistics a row. On a CPU torch's own sums
    the gradients of weight and bias in their dtype (on CUDA in fp32): of 4,096 rows in bf16 half a bias' is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        kind = wide(x.dtype)
        y, mean, rstd = torch.native_layer_norm(x.to(kind), x.shape[-1:], weight.to(kind), bias.to(kind), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        kind = rstd.dtype
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.to(kind), x.to(kind), x.shape[-1:], mean, rstd, weight.to(kind), bias.to(kind), [True] * 3)
        return grads[0].to(x.dtype), grads[1].to(weight.dtype), grads[2].to(bias.dtype), None
