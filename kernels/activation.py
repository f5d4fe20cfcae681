"""The MLP's nonlinearities: SwiGLU (arXiv:2002.05202) and tanh GELU (arXiv:1606.08415).

SwiGLU: y = silu(gate) up. Only gate and up are kept; the backward computes silu again:
d_up = g silu(gate);  d_gate = g up silu'(gate).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return both


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 ffn], gate first -> [..., ffn]."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's tanh GELU, [..., ffn] -> [..., ffn]."""
    return F.gelu(x, approximate="tanh")
