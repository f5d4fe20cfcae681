"""Cross-entropy over a vocabulary split by rows of the head (arXiv:1909.08053, section 3: never gather the logits).

loss = lse - logit of the label + z lse^2, lse = log sum exp(logits); z is the weight of the z-loss (arXiv:2204.02311,
section 5). Each rank holds its columns; the row maximum, the sum of exponentials and the label's logit are all-reduced
(one number a token each). The gradient, softmax (1 + 2 z lse) - onehot, is formed in the memory of the logits, so that
they exist once.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from engine.kernels.norm import wide

IGNORE = -100
"""Label of a token that is not supervised."""


class Reducer(Protocol):
    """The ranks that hold the other columns."""

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
        """Puts the sum (or "max") over the ranks into x."""
        ...


class Rows(NamedTuple):
    """What the reference knows of each row [tokens] after its forward pass; `here`: the label is among its columns."""

    losses: torch.Tensor
    sums: torch.Tensor
    lse: torch.Tensor | None
    supervised: torch.Tensor
    here: torch.Tensor
    local: torch.Tensor


def reference_rows(work: torch.Tensor, labels: torch.Tensor, first: int, vocab: int, group: Reducer | None,
                   z_loss: float) -> Rows:
    """The losses; turns the logits `work`, fp32 or fp64, into exp(logits - their row's maximum)."""
    columns = work.shape[-1]
    if first + columns > vocab:
        work[:, max(0, vocab - first):] = float("-inf")  # padded rows of the head
    top = work.amax(-1, keepdim=True)
    if group is not None:
        group.all_reduce_(top, "max")
    top.masked_fill_(top == float("-inf"), 0)  # a row without any logit: 0 - 0 is a number, inf - inf is none
    work.sub_(top)
    local = labels - first
    here = (local >= 0) & (local < columns)
    local = local.masked_fill(~here, 0).unsqueeze(-1)
    label_logit = work.gather(-1, local).squeeze(-1).masked_fill(~here, 0)
    work.exp_()
    sums = torch.stack([work.sum(-1), label_logit])  # [2, tokens]
    if group is not None:
        group.all_reduce_(sums)
    supervised = (labels != IGNORE) & (sums[0] != 0)
    losses = sums[0].log() - sums[1]
    lse = None
    if z_loss:
        lse = sums[0].log() + top.squeeze(-1)
        losses = losses + z_loss * lse.square()
    return Rows(losses.masked_fill_(~supervised, 0), sums[0], lse, supervised, here, local)


def reference_gradient_(work: torch.Tensor, rows: Rows, z_loss: float, scale: float = 1.0) -> None:
    """Turns the exponentials of `reference_rows` into the gradient of scale * sum(losses)."""
    factor = (scale / rows.sums).masked_fill_(~rows.supervised, 0)
    if rows.lse is not None:
        factor *= torch.where(rows.supervised, 1 + 2 * z_loss * rows.lse, 0)
    work.mul_(factor.unsqueeze(-1))  # softmax; 0 where nothing is supervised
    label = (rows.here & rows.supervised).unsqueeze(-1).to(work.dtype) * -scale
    work.scatter_add_(-1, rows.local, label)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, vocab: int,
                group: Reducer | None, z_loss: float) -> torch.Tensor:
        work = logits.to(wide(logits.dtype))  # the logits themselves where they are wide already
        rows = reference_rows(work, labels, first, vocab, group, z_loss)
        if ctx.needs_input_grad[0]:
            reference_gradient_(work, rows, z_loss)
            ctx.save_for_backward(work.to(logits.dtype))
        return rows.losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (softmax,) = ctx.saved_tensors
        return softmax * grad.unsqueeze(-1).to(softmax.dtype), None, None, None, None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, first: int = 0, vocab: int,
                  group: Reducer | None = None, z_loss: float = 0.0) -> torch.Tensor:
    """Loss of each token, 0 where the label is IGNORE. The logits' memory is used up.

    logits [tokens, columns] are the vocabulary's columns [first, first + columns); those past `vocab` are padding.
    labels [tokens] count over the whole vocabulary. Returns [tokens], never below fp32, the same bits on all ranks.
    """
    return _CrossEntropy.apply(logits, labels, first, vocab, group, z_loss)  # type: ignore[no-any-return]
