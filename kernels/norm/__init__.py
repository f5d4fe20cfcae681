"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) over the last dim, with or without a residual addition.

RMSNorm: y = w xhat, xhat = x / rms(x), rms(x) = sqrt(mean(x^2) + eps). With g the gradient of y:
gw = sum over rows of g xhat;  gx = (g w - xhat mean(g w xhat)) / rms(x).
LayerNorm: y = w xhat + b, xhat = (x - mean(x)) / std(x), std(x) = sqrt(var(x) + eps); gw as above, gb = sum of g;
gx = (g w - mean(g w) - xhat mean(g w xhat)) / std(x).
Before a norm stands `total = x + branch`, rounded: both get gx plus the gradient of total.
Statistics are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.norm import backward as _backward
from engine.kernels.norm import forward as _forward
from engine.kernels.norm.forward import WIDEST, Tensors
from engine.kernels.norm.reference import LayerNorm, RMSNorm
from engine.kernels.norm.rows import Maybe

_norm_op = torch.library.custom_op(
    "triax::norm", _forward.forward, mutates_args=(),
    schema="(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
_norm_op.register_fake(_forward.outputs)
_norm_backward_op = torch.library.custom_op(
    "triax::norm_backward", _backward.backward, mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd) "
           "-> (Tensor, Tensor, Tensor)")
_norm_backward_op.register_fake(_backward.gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.added, ctx.biased = inputs[1] is not None, inputs[3] is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.added else inputs[0], *inputs[2:4], *output[2:])


def _differentiate(ctx: Any, grad: Maybe, grad_total: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
    grad_total = grad_total if ctx.added else None
    if grad is None:
        return grad_total, grad_total, None, None, None
    grad_x, grad_weight, grad_bias = _norm_backward_op(grad, grad_total, *ctx.saved_tensors)
    return grad_x, grad_x if ctx.added else None, grad_weight, grad_bias if ctx.biased else None, None


_norm_op.register_autograd(_differentiate, setup_context=_keep)


class _NormAndItself(torch.autograd.Function):
    """A norm of x, and x itself. The gradients of both are added in the norm's backward pass before they are rounded,
    as they are where a branch was added: bits do not depend on who made the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Maybe, eps: float) -> tuple[Tensor, Tensor]:
        y, _, mean, rstd = _norm_op(x, None, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Maybe, grad_total: Maybe) -> tuple[Maybe, ...]:  # type: ignore[override]
        if grad is None:
            return grad_total, None, None, None
        saved = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _norm_backward_op(grad, grad_total, *saved)
        return grad_x, grad_weight, None if saved[2] is None else grad_bias, None


def _triton(x: Tensor, branch: Maybe, weight: Tensor, bias: Maybe, eps: float) -> tuple[Tensor, Tensor]:
    """y and total, by the kernels. ValueError where x is too wide, or the branch is not like it."""
    if x.shape[-1] > WIDEST:
        raise ValueError(f"a norm by 'triton' takes rows of up to {WIDEST} columns, x has {x.shape[-1]}")
    if branch is not None and (branch.shape, branch.dtype) != (x.shape, x.dtype):
        kinds = [f"{t.dtype} {list(t.shape)}" for t in (x, branch)]
        raise ValueError(f"what is added must be like x: {kinds[1]} is not {kinds[0]}")
    if branch is None:
        return _NormAndItself.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    y, total, _, _ = _norm_op(x, branch, weight, bias, eps)
    return y, total


@lru_cache
def apex_norm(kind: str) -> Callable[..., Tensor] | None:
    """NVIDIA Apex's norm, "rms" (x, weight, shape, eps) or "layer" (x, weight, bias, shape, eps). None where it is not
    installed or gives other numbers than ours: PyPI has another project of that name."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

        x = torch.linspace(-1, 2, 96, device="cuda").view(3, 32)
        theirs, parameters = (fused_rms_norm_affine, [x[0]]) if kind == "rms" else (fused_layer_norm_affine, [*x[:2]])
        ours: Callable[..., Tensor] = rms_norm if kind == "rms" else layer_norm
        good = torch.allclose(theirs(x, *parameters, (32,), 1e-5), ours(x, *parameters, 1e-5), atol=1e-5)
    except Exception:  # whatever is wrong with it, it is not what was looked for
        return None
    return theirs if good else None


def _apex(kind: str, by: str) -> Callable[..., Tensor]:
    if by != "apex":
        raise ValueError(f"a norm's by is {by!r}; there are 'torch', 'triton' and 'apex'")
    if found := apex_norm(kind):
        return found
    raise RuntimeError("NVIDIA Apex is not installed here, or its norms do not give the right numbers")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, by: str = "torch") -> Tensor:
    """x [..., width], weight [width] -> [..., width]; by "torch", "triton" or "apex"."""
    if by == "triton":
        return _triton(x, None, weight, None, eps)[0]
    if by != "torch":
        return _apex("rms", by)(x, weight, x.shape[-1:], eps)
    return RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, by: str = "torch") -> Tensor:
    """x [..., width], weight and bias [width] -> [..., width]; by "torch", "triton" or "apex"."""
    if by == "triton":
        return _triton(x, None, weight, bias, eps)[0]
    if by != "torch":
        return _apex("layer", by)(x, weight, bias, x.shape[-1:], eps)
    if x.is_cuda:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, branch: Maybe, weight: Tensor, eps: float, *, by: str = "torch") -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total), total = x + branch rounded to their dtype: the next residual, and what is normalised.
    With a branch of None total is x. By "triton" it is one pass each way: the gradient of total is added in the norm's
    backward."""
    if by == "triton":
        return _triton(x, branch, weight, None, eps)
    total = x if branch is None else x + branch
    return rms_norm(total, weight, eps, by=by), total


def add_layer_norm(x: Tensor, branch: Maybe, weight: Tensor, bias: Tensor, eps: float, *,
                   by: str = "torch") -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`, with LayerNorm."""
    if by == "triton":
        return _triton(x, branch, weight, bias, eps)
    total = x if branch is None else x + branch
    return layer_norm(total, weight, bias, eps, by=by), total
