"""The output projection and the cross-entropy in chunks of tokens, so that logits never exist whole.

logits = x W^T; losses as in kernels/cross_entropy.py; with the gradient D of the logits of a chunk, dx = D W and
dW += D^T x. Both are formed at once, chunk by chunk: what the sum of losses is multiplied with is known beforehand, so
nothing is kept for, or computed again in, a backward pass (Liger's order, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels.cross_entropy import Reducer, reference_gradient_, reference_rows
from engine.kernels.norm import wide

AddWeightGrad = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Takes a chunk's gradient D [chunk, columns] and x [chunk, hidden]; adds D^T x to the weight's gradient. The third is
the chunk's finished rows of x's gradient (None if not asked for), whose sum over the ranks may begin meanwhile."""


@torch.no_grad()
def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, scale: float, first: int = 0,
                         vocab: int, group: Reducer | None = None, z_loss: float = 0.0, chunk: int | None = None,
                         by: str = "torch", grad_x: bool = True, add_weight_grad: AddWeightGrad | None = None,
                         ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of x W^T, and the gradient of scale * sum(losses); without autograd.

    x [tokens, hidden]; weight [columns, hidden], the rows [first, first + columns) of the head, those past `vocab`
    padding; labels [tokens] over the whole vocabulary. Returns the losses [tokens], fp32 or fp64, not scaled, 0 where
    the label is IGNORE, the same bits on all ranks of `group`; and, if `grad_x`, the gradient of x [tokens, hidden] in
    its dtype: these columns' part, which the caller adds up over the ranks. With neither gradient it only evaluates.
    `chunk`: tokens whose logits exist at a time.
    """
    tokens = x.shape[0]
    losses = x.new_empty(tokens, dtype=wide(x.dtype))
    dx = torch.empty_like(x) if grad_x else None
    step = chunk or max(1, tokens)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        logits = x[part] @ weight.t()
        work = logits.to(wide(x.dtype))
        rows = reference_rows(work, labels[part], first, vocab, group, z_loss)
        losses[part] = rows.losses
        if dx is None and add_weight_grad is None:
            continue
        reference_gradient_(work, rows, z_loss, scale)
        if work is not logits:
            logits.copy_(work)
        if dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if add_weight_grad is not None:
            add_weight_grad(logits, x[part], None if dx is None else dx[part])
    return losses, dx
