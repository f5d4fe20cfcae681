"""The two moments at which a layer tells of a weight: `use` before it reads it, `done` when its gradient is complete.

A gradient is added in fp32 into the parameter's view of its bucket; a parameter without a bucket gets it from autograd.
"""

from __future__ import annotations

import torch


def use(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself, once the rows that other ranks have updated are there. Forward passes read weights by it.

    Layers keep what it returns as an attribute of their context: a saved tensor would pin the memory and its version.
    """
    arrive = getattr(weight, "on_use", None)
    if arrive is not None:
        arrive()
    return weight


def accumulate_product(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Adds grad^T x, the gradient of a linear layer's weight, into `weight.main_grad`; returns it when there is none.

    grad [tokens, outputs], x [tokens, inputs].
    """
    if getattr(weight, "main_grad", None) is None:
        return grad.t() @ x
    add_product(weight, grad, x)
    done(weight)
    return None


def add_product(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Adds grad^T x into `weight.main_grad`; the weight's gradient of this backward pass may have more parts, so call
    `done` after the last.

    In the bucket's own dtype, and where the bucket says so (`wide_products`) from bf16 to its fp32 too, the product is
    accumulated in place; else it is made first and added.
    """
    main: torch.Tensor | None = getattr(weight, "main_grad", None)
    if main is None:  # no bucket: as plain autograd would
        product = grad.t() @ x
        weight.grad = product if weight.grad is None else weight.grad.add_(product)
        return
    # beta 0 on the step's first gradient: what the bucket held before is overwritten, so it is never zeroed.
    beta = 0 if weight.grad_empty else 1  # type: ignore[attr-defined]
    if main.dtype == grad.dtype:
        torch.addmm(main, grad.t(), x, beta=beta, out=main)
        weight.grad_empty = False  # type: ignore[attr-defined]
    elif weight.wide_products:  # type: ignore[attr-defined]
        torch.addmm(main, grad.t(), x, out_dtype=main.dtype, beta=beta, out=main)
        weight.grad_empty = False  # type: ignore[attr-defined]
    else:
        _add(weight, grad.t() @ x)


def accumulate_rows(weight: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
    """Adds rows of an embedding's gradient, grad [tokens, width], to the rows ids [tokens] of `weight.main_grad`;
    returns the whole gradient when there is none. Always in one order, and without a tensor of the weight's size."""
    main: torch.Tensor | None = getattr(weight, "main_grad", None)
    if main is None:
        return torch.ops.aten.embedding_dense_backward(grad, ids, weight.shape[0], -1, False)
    if weight.grad_empty:  # type: ignore[attr-defined]
        main.zero_()
        weight.grad_empty = False  # type: ignore[attr-defined]
    if main.is_cuda:  # index_add_ would use atomics there; index_put_ sorts, and on a CPU takes longer
        main.index_put_((ids,), grad.to(main.dtype), accumulate=True)
    else:
        main.index_add_(0, ids, grad.to(main.dtype))
    done(weight)
    return None


def accumulate(parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """Adds `grad` into `parameter.main_grad`; returns it when the parameter has no bucket."""
    if getattr(parameter, "main_grad", None) is None:
        return grad
    _add(parameter, grad)
    done(parameter)
    return None


def _add(parameter: torch.Tensor, grad: torch.Tensor) -> None:
    main: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    if parameter.grad_empty:  # type: ignore[attr-defined]
        main.copy_(grad)
    else:
        main.add_(grad)
    parameter.grad_empty = False  # type: ignore[attr-defined]


def done(parameter: torch.Tensor) -> None:
    """Says that the parameter's gradient of this backward pass is complete."""
    if hasattr(parameter, "on_grad"):
        parameter.on_grad()


def collect(parameter: torch.Tensor) -> None:
    """The post-accumulate hook of parameters that plain autograd differentiates: moves `.grad` into the bucket."""
    if parameter.grad is not None:
        accumulate(parameter, parameter.grad)
        parameter.grad = None
