"""Cross-entropy over a vocabulary split by rows of the head (arXiv:1909.08053, section 3: never gather the logits).

loss = log sum exp(logits) - logit of the label. Each rank holds its columns; the row maximum, the sum of exponentials
and the label's logit are all-reduced (one number a token each). The gradient, softmax - onehot, is formed in the
forward pass in the memory of the logits, so that they exist once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from engine.kernels.norm import wide

IGNORE = -100
"""Label of a token that is not supervised."""


class Reducer(Protocol):
    """The ranks that hold the other columns."""

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
        """Puts the sum (or "max") over the ranks into x."""
        ...


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, vocab: int,
                group: Reducer | None) -> torch.Tensor:
        work = logits.to(wide(logits.dtype))  # the logits themselves where they are wide already
        columns = work.shape[-1]
        if first + columns > vocab:
            work[:, max(0, vocab - first):] = float("-inf")  # padded rows of the head
        top = work.amax(-1, keepdim=True)
        if group is not None:
            group.all_reduce_(top, "max")
        work.sub_(top)
        local = labels - first
        here = (local >= 0) & (local < columns)
        local = local.masked_fill(~here, 0).unsqueeze(-1)
        label_logit = work.gather(-1, local).squeeze(-1).masked_fill(~here, 0)
        work.exp_()
        sums = torch.stack([work.sum(-1), label_logit])  # [2, tokens]
        if group is not None:
            group.all_reduce_(sums)
        supervised = labels != IGNORE
        loss = (sums[0].log() - sums[1]).masked_fill(~supervised, 0)
        if ctx.needs_input_grad[0]:
            work.mul_((supervised / sums[0]).unsqueeze(-1))  # softmax; 0 where nothing is supervised
            work.scatter_add_(-1, local, -(here & supervised).unsqueeze(-1).to(work.dtype))
            ctx.save_for_backward(work.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (softmax,) = ctx.saved_tensors
        return softmax * grad.unsqueeze(-1).to(softmax.dtype), None, None, None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, first: int = 0, vocab: int,
                  group: Reducer | None = None) -> torch.Tensor:
    """Loss of each token, 0 where the label is IGNORE. The logits' memory is used up.

    logits [tokens, columns] are the vocabulary's columns [first, first + columns); those past `vocab` are padding.
    labels [tokens] count over the whole vocabulary. Returns [tokens], never below fp32, the same bits on all ranks.
    """
    return _CrossEntropy.apply(logits, labels, first, vocab, group)  # type: ignore[no-any-return]
