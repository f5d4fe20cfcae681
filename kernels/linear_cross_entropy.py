"""The output projection and the cross-entropy in chunks of tokens, so that logits never exist whole.

logits = x W^T; losses as in kernels/cross_entropy.py; with the gradient D of the logits of a chunk, dx = D W and
dW += D^T x. Both are formed at once, chunk by chunk: what the sum of losses is multiplied with is known beforehand, so
nothing is kept for, or computed again in, a backward pass (Liger's order, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.kernels.cross_entropy import Reducer, fused_rows, gradient_, reference_gradient_, reference_rows
from engine.kernels.language import wide

AddWeightGrad = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Takes a chunk's gradient D [chunk, columns] and x [chunk, hidden]; adds D^T x to the weight's gradient. The third is
the chunk's finished rows of x's gradient (None if not asked for), whose sum over the ranks may begin meanwhile."""


def _torch_chunk(logits: torch.Tensor, labels: torch.Tensor, scale: float | None, first: int, vocab: int,
                 group: Reducer | None, z_loss: float) -> torch.Tensor:
    """The losses of a chunk; its logits become the gradient of scale * sum(losses), unless scale is None."""
    work = logits.to(wide(logits.dtype))  # the logits themselves where they are wide already
    rows = reference_rows(work, labels, first, vocab, group, z_loss)
    if scale is not None:
        reference_gradient_(work, rows, z_loss, scale)
        if work is not logits:
            logits.copy_(work)
    return rows.losses


def _triton_chunk(logits: torch.Tensor, labels: torch.Tensor, scale: float | None, first: int, vocab: int,
                  group: Reducer | None, z_loss: float) -> torch.Tensor:
    """The same by the kernels of kernels/cross_entropy.py."""
    losses, tops, sums = fused_rows(logits, labels, first, vocab, group, z_loss)
    if scale is not None:
        gradient_(logits, labels, tops, sums, None, scale, first, vocab, z_loss)
    return losses


_CHUNKS = {"torch": _torch_chunk, "triton": _triton_chunk}


def chunk_tokens(columns: int) -> int:
    """Tokens whose logits exist at a time on a GPU: 1,024 for 128,256 columns, 256 MiB of bf16.

    8,192 tokens are then 8 chunks. With fewer tokens the product D W, [1024, 4096] in tiles of 128 x 256, would no
    longer fill 132 multiprocessors, and every chunk reads and writes the weight's whole fp32 gradient (4.2 GB) once
    more. The product D^T x, where it has to be made in bf16 before it is added, is another 1.05 GB; 1.3 GB in all.
    """
    return max(256, 2**27 // columns // 256 * 256)


@torch.no_grad()
def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, scale: float, first: int = 0,
                         vocab: int, group: Reducer | None = None, z_loss: float = 0.0, chunk: int | None = None,
                         by: str = "torch", grad_x: bool | torch.Tensor = True,
                         add_weight_grad: AddWeightGrad | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of x W^T, and the gradient of scale * sum(losses); without autograd.

    x [tokens, hidden]; weight [columns, hidden], the rows [first, first + columns) of the head, those past `vocab`
    padding; labels [tokens] over the whole vocabulary. Returns the losses [tokens], fp32 or fp64, not scaled, 0 where
    the label is IGNORE, the same bits on all ranks of `group`; and, if `grad_x`, the gradient of x [tokens, hidden] in
    its dtype: these columns' part, which the caller adds up over the ranks (it may give the memory, as `grad_x`). With
    neither gradient it only evaluates.
    `chunk`: tokens whose logits exist at a time; None is all of them by torch, `chunk_tokens` by triton (which computes
    in fp32; the matrix products are torch's).
    """
    tokens = x.shape[0]
    losses = x.new_empty(tokens, dtype=wide(x.dtype))
    dx = grad_x if isinstance(grad_x, torch.Tensor) else (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if grad_x else None)
    gradients = dx is not None or add_weight_grad is not None
    step = chunk or (chunk_tokens(weight.shape[0]) if by == "triton" else max(1, tokens))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        logits = x[part] @ weight.t()
        losses[part] = _CHUNKS[by](logits, labels[part], scale if gradients else None, first, vocab, group, z_loss)
        if dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if add_weight_grad is not None:
            add_weight_grad(logits, x[part], None if dx is None else dx[part])
        del logits  # before the next chunk's are made
    return losses, dx


class _LinearCrossEntropyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
                options: dict[str, Any]) -> torch.Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=weight.device) if need_weight else None

        def add(dlogits: torch.Tensor, rows: torch.Tensor, dx: torch.Tensor | None) -> None:
            assert total is not None
            total.add_(dlogits.t() @ rows)

        losses, dx = linear_cross_entropy(x, weight, labels, grad_x=need_x,
                                          add_weight_grad=add if need_weight else None, **options)
        ctx.save_for_backward(dx, None if total is None else total.to(weight.dtype))
        return losses.sum() * options["scale"]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        dx, dweight = (g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return dx, dweight, None, None


def linear_cross_entropy_loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, scale: float, vocab: int,
                              z_loss: float = 0.0, chunk: int | None = None, by: str = "torch") -> torch.Tensor:
    """scale * sum(losses) of `linear_cross_entropy` for autograd, on one rank: the forward pass makes both gradients
    and keeps them, the backward pass multiplies them."""
    options = {"scale": scale, "vocab": vocab, "z_loss": z_loss, "chunk": chunk, "by": by}
    return _LinearCrossEntropyLoss.apply(x, weight, labels, options)  # type: ignore[no-any-return]
