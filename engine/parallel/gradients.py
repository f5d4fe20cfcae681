"""Where a gradient goes: added in fp32 into the parameter's view of its bucket, or back to autograd without one."""

from __future__ import annotations

import torch


def accumulate_product(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Adds grad^T x, the gradient of a linear layer's weight, into `weight.main_grad`; returns it when there is none.

    grad [tokens, outputs], x [tokens, inputs]. In the bucket's own dtype the product is accumulated in place.
    """
    main = getattr(weight, "main_grad", None)
    if main is None:
        return grad.t() @ x
    if main.dtype == grad.dtype:
        # beta 0 on the step's first gradient: what the bucket held before is overwritten, so it is never zeroed.
        torch.addmm(main, grad.t(), x, beta=0 if weight.grad_empty else 1, out=main)  # type: ignore[attr-defined]
        _done(weight)
        return None
    return accumulate(weight, grad.t() @ x)


def accumulate(parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """Adds `grad` into `parameter.main_grad`; returns it when the parameter has no bucket."""
    main = getattr(parameter, "main_grad", None)
    if main is None:
        return grad
    if parameter.grad_empty:  # type: ignore[attr-defined]
        main.copy_(grad)
    else:
        main.add_(grad)
    _done(parameter)
    return None


def _done(parameter: torch.Tensor) -> None:
    parameter.grad_empty = False  # type: ignore[attr-defined]
    parameter.on_grad()  # type: ignore[attr-defined]


def collect(parameter: torch.Tensor) -> None:
    """The post-accumulate hook of parameters that plain autograd differentiates: moves `.grad` into the bucket."""
    if parameter.grad is not None:
        accumulate(parameter, parameter.grad)
        parameter.grad = None
