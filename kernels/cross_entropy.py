"""Cross-entropy over a vocabulary split by rows of the head (arXiv:1909.08053, section 3: never gather the logits).

loss = lse - logit of the label + z lse^2, lse = log sum exp(logits); z is the weight of the z-loss (arXiv:2204.02311,
section 5). Each rank holds its columns; the row maximum, the sum of exponentials and the label's logit are all-reduced
(one number a token each). The gradient, softmax (1 + 2 z lse) - onehot, is formed in the memory of the logits, so that
they exist once.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from engine.kernels.language import LOWEST, cdiv, exp, jit, jit_counting, power_of_two, rounded, tl, wide

IGNORE = -100
"""Label of a token that is not supervised."""


_IGNORE = tl.constexpr(IGNORE)


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


@jit
def _loss(top, total, label_logit, supervised, z_loss):
    """The loss of rows; `label_logit` is relative to `top`. A row without any logit, of total 0, has none."""
    alive = supervised & (total != 0)
    log = tl.log(tl.where(alive, total, 1.0))
    lse = tl.where(alive, log + top, 0.0)
    return tl.where(alive, log - label_logit + z_loss * lse * lse, 0.0)


@jit_counting("tokens")
def _statistics_kernel(logits, stride_row, labels, tops, sums, losses, tokens, columns, limit, first, z_loss,
                       LANES: tl.constexpr, DEPTH: tl.constexpr, ALONE: tl.constexpr):
    """One row: its maximum, the sum of exponentials relative to it and the label's logit, reading it once.

    Each of LANES lanes has a maximum and a sum of its own, of DEPTH logits at a time that one thread holds: no thread
    waits for another before the end, and a logit costs 1 + 1/DEPTH exponentials. ALONE: all columns are here, so the
    loss is too.
    """
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    label = tl.load(labels + row)
    supervised = label != _IGNORE
    logits += row.to(tl.int64) * stride_row
    column = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # Loads end at the columns in memory, often a multiple of 16, so that they stay wide; the vocabulary's end is not.
    held = tl.where(supervised, columns, 0)
    seen = tl.where(supervised, limit, 0)
    top = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, limit, LANES * DEPTH):
        x = tl.load(logits + start + column, mask=start + column < held, other=0.0).to(tl.float32)
        x = tl.where(start + column < seen, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * exp(top - higher) + tl.sum(exp(x - higher[None, :]), 0)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(total * exp(top - highest), 0)
    local = label - first
    here = supervised & (local >= 0) & (local < limit)
    label_logit = tl.load(logits + local, mask=here, other=0.0).to(tl.float32)
    if ALONE:
        label_logit = tl.where(here, label_logit - highest, 0.0)
        tl.store(losses + row, _loss(highest, total, label_logit, supervised, z_loss))
    tl.store(tops + row, highest)
    tl.store(sums + row, total)
    tl.store(sums + tokens + row, label_logit)


@jit_counting("tokens")
def _rebase_kernel(own, tops, sums, labels, tokens, limit, first, BLOCK_M: tl.constexpr):
    """Makes a rank's sums and label's logits relative to the maximum over all ranks."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tokens
    top = tl.load(tops + row, mask=inside, other=0.0)
    total = tl.load(sums + row, mask=inside, other=0.0)
    label_logit = tl.load(sums + tokens + row, mask=inside, other=0.0)
    label = tl.load(labels + row, mask=inside, other=_IGNORE)
    here = (label != _IGNORE) & (label >= first) & (label - first < limit)
    tl.store(sums + row, total * exp(tl.load(own + row, mask=inside, other=0.0) - top), mask=inside)
    tl.store(sums + tokens + row, tl.where(here, label_logit - top, 0.0), mask=inside)


@jit_counting("tokens")
def _loss_kernel(tops, sums, labels, losses, tokens, z_loss, BLOCK_M: tl.constexpr):
    """The losses from the statistics over all ranks."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tokens
    supervised = tl.load(labels + row, mask=inside, other=_IGNORE) != _IGNORE
    loss = _loss(tl.load(tops + row, mask=inside, other=0.0), tl.load(sums + row, mask=inside, other=0.0),
                 tl.load(sums + tokens + row, mask=inside, other=0.0), supervised, z_loss)
    tl.store(losses + row, loss, mask=inside)


@jit
def _gradient_kernel(logits, stride_row, labels, tops, sums, grads, stride_grads, scale, columns, limit, first, z_loss,
                     BLOCK_N: tl.constexpr):
    """A block of a row of logits becomes its gradient, in fp32 until it is stored."""
    blocks = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    label, top, total = tl.load(labels + row), tl.load(tops + row), tl.load(sums + row)
    alive = (label != _IGNORE) & (total != 0)
    total = tl.where(alive, total, 1.0)
    grad = tl.cast(scale, tl.float32)
    if grads is not None:
        grad *= tl.load(grads + row.to(tl.int64) * stride_grads).to(tl.float32)
    factor = grad / total * (1 + 2 * z_loss * (top + tl.log(total)))
    local = (label - first).to(tl.int32)
    logits += row.to(tl.int64) * stride_row + column
    x = tl.load(logits, mask=column < tl.where(alive, columns, 0), other=float("-inf")).to(tl.float32)
    d = exp(x - top) * factor - tl.where(column == local, grad, 0.0)
    d = tl.where(column < tl.where(alive, limit, 0), d, 0.0)
    tl.store(logits, rounded(d, logits.dtype.element_ty), mask=column < columns)


# Columns at most -> LANES, DEPTH and num_warps of the statistics; wider rows are read in steps of the last line's. A
# thread holds 32 logits in four loads of 16 bytes (bf16). Four warps a row: 8,192 tokens, or a chunk of 1,024, are rows
# enough to fill 132 multiprocessors with 8 blocks each, so a row's columns are not split over programs, which would
# cost a second launch; and few warps wait little for each other at a row's end.
STATISTICS_TILES = ((512, (None, 1, 1)), (1024, (1024, 1, 4)), (2048, (1024, 2, 4)), (4096, (1024, 4, 4)))
# The gradient's BLOCK_N, 32 logits a thread again, and what a warp has of it.
GRADIENT_N = 4096
GRADIENT_WARP = 1024
# Tokens of a program of the kernels that add up ranks: a number or two each, so any size does.
REDUCTION_M = 1024


def _statistics_tile(columns: int) -> dict[str, int]:
    """What STATISTICS_TILES says for a rank's columns; None there is the power of two that holds them."""
    lanes, depth, warps = next((tile for most, tile in STATISTICS_TILES if columns <= most), STATISTICS_TILES[-1][1])
    return {"LANES": lanes or power_of_two(columns), "DEPTH": depth, "num_warps": warps}


def _rows_in_place(logits: torch.Tensor) -> torch.Tensor:
    """The logits, or a copy where their rows overlap or are not plain memory."""
    plain = logits.stride(1) == 1 and (logits.stride(0) >= logits.shape[1] or logits.shape[0] < 2)
    return logits if plain else logits.contiguous()


def _limit(columns: int, first: int, vocab: int) -> int:
    """How many of a rank's columns are not padding."""
    return max(0, min(columns, vocab - first))


def launch_statistics(logits: torch.Tensor, labels: torch.Tensor, first: int, vocab: int, z_loss: float,
                      alone: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [tokens] (empty memory if not `alone`), maxima [tokens], and [2, tokens]: the sums of exponentials and the
    labels' logits, relative to the maximum if `alone`; all fp32. logits [tokens, columns], labels [tokens]."""
    tokens, columns = logits.shape
    losses, tops = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    sums = logits.new_empty(2, tokens, dtype=torch.float32)
    if tokens:
        _statistics_kernel[(tokens,)](
            logits, logits.stride(0), labels.contiguous(), tops, sums, losses, tokens, columns,
            _limit(columns, first, vocab), first, z_loss, ALONE=alone, **_statistics_tile(columns))
    return losses, tops, sums


def launch_gradient_(logits: torch.Tensor, labels: torch.Tensor, tops: torch.Tensor, sums: torch.Tensor,
                     grads: torch.Tensor | None, scale: float, first: int, vocab: int, z_loss: float) -> None:
    """Turns logits [tokens, columns] into the gradient of scale * sum(grads * losses); grads [tokens], or None for
    ones."""
    tokens, columns = logits.shape
    if not tokens:
        return
    block = min(GRADIENT_N, power_of_two(columns))
    _gradient_kernel[(tokens * cdiv(columns, block),)](
        logits, logits.stride(0), labels.contiguous(), tops, sums, grads, 0 if grads is None else grads.stride(0),
        scale, columns, _limit(columns, first, vocab), first, z_loss, BLOCK_N=block,
        num_warps=max(1, block // GRADIENT_WARP))


def launch_reduction(tops: torch.Tensor, sums: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, columns: int,
                     first: int, vocab: int, z_loss: float, group: Reducer) -> None:
    """Turns one rank's statistics into those over all ranks of `group`, and writes the losses."""
    tokens = labels.shape[0]
    if not tokens:
        return
    own, labels, grid = tops.clone(), labels.contiguous(), (cdiv(tokens, REDUCTION_M),)
    group.all_reduce_(tops, "max")
    _rebase_kernel[grid](own, tops, sums, labels, tokens, _limit(columns, first, vocab), first, BLOCK_M=REDUCTION_M)
    group.all_reduce_(sums)
    _loss_kernel[grid](tops, sums, labels, losses, tokens, z_loss, BLOCK_M=REDUCTION_M)


statistics = torch.library.custom_op("triax::cross_entropy_statistics", launch_statistics, mutates_args=())
gradient_ = torch.library.custom_op("triax::cross_entropy_gradient_", launch_gradient_, mutates_args=("logits",))


@statistics.register_fake
def _statistics_fake(logits: torch.Tensor, labels: torch.Tensor, first: int, vocab: int, z_loss: float,
                     alone: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, tops = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    return losses, tops, logits.new_empty(2, logits.shape[0], dtype=torch.float32)


@gradient_.register_fake
def _gradient_fake(logits: torch.Tensor, labels: torch.Tensor, tops: torch.Tensor, sums: torch.Tensor,
                   grads: torch.Tensor | None, scale: float, first: int, vocab: int, z_loss: float) -> None:
    return None


def fused_rows(logits: torch.Tensor, labels: torch.Tensor, first: int, vocab: int, group: Reducer | None,
               z_loss: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, maxima and sums over all columns of all ranks."""
    losses, tops, sums = statistics(logits, labels, first, vocab, z_loss, group is None)
    if group is not None:
        launch_reduction(tops, sums, labels, losses, logits.shape[1], first, vocab, z_loss, group)
    return losses, tops, sums


class _FusedCrossEntropy(torch.autograd.Function):
    """Keeps the logits; its backward pass writes the gradient into their memory, never into `grad`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, vocab: int,
                group: Reducer | None, z_loss: float) -> torch.Tensor:
        logits = _rows_in_place(logits)
        losses, tops, sums = fused_rows(logits, labels, first, vocab, group, z_loss)
        ctx.save_for_backward(logits, labels, tops, sums)
        ctx.numbers = (first, vocab, z_loss)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        logits, labels, tops, sums = ctx.saved_tensors
        gradient_(logits, labels, tops, sums, grad, 1.0, *ctx.numbers)
        return logits.detach(), None, None, None, None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, first: int = 0, vocab: int,
                  group: Reducer | None = None, z_loss: float = 0.0, by: str = "torch") -> torch.Tensor:
    """Loss of each token, 0 where the label is IGNORE. The logits' memory is used up.

    logits [tokens, columns] are the vocabulary's columns [first, first + columns); those past `vocab` are padding.
    labels [tokens] count over the whole vocabulary. `by` is torch, or triton: fp32, fp16 and bf16 in two kernels.
    Returns [tokens], never below fp32, the same bits on all ranks.
    """
    function = {"torch": _CrossEntropy, "triton": _FusedCrossEntropy}[by]
    return function.apply(logits, labels, first, vocab, group, z_loss)  # type: ignore[no-any-return]
