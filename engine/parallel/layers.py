"""Layers whose weights are split over the tensor axis: column-, row- and vocabulary-parallel (arXiv:1909.08053, 3).

The linear layers are autograd functions of ours for three reasons: weight gradients are added straight into the fp32
bucket (`main_grad`) without a tensor in between; the collective of the input's gradient runs while the weight's
gradient is computed; under sequence parallelism the gathered input is not kept but gathered again, while the input's
gradient is computed. An input that is cheap to make again need not be kept at all (`Remade`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.comm.comm import Pending
from engine.kernels.linear_cross_entropy import linear_cross_entropy
from engine.parallel.collectives import (
    TensorParallel,
    all_gather_sequence,
    leave,
    start_all_gather_sequence,
    start_reduce_scatter_sequence,
)
from engine.parallel.gradients import accumulate, accumulate_product, accumulate_rows, add_product, done, use
from engine.parallel.sharding import Member, Shard, make_parameter, split_columns, split_rows, whole

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Remade:
    """How a linear layer's input is made again in the backward pass, so that it is not kept: `make(source)`.

    `source` is a tensor that the function before the layer keeps for itself anyhow. `make` gives the bits that it gave
    in the forward pass, and costs little: a norm, or an activation.
    """

    make: Callable[[torch.Tensor], torch.Tensor]
    source: torch.Tensor


def _keep_input(ctx: Any, x: torch.Tensor, remade: Remade | None) -> None:
    """Keeps a layer's input, or what it will be made of."""
    ctx.make = None if remade is None else remade.make
    ctx.save_for_backward(x if remade is None else remade.source.detach())


def _kept_input(ctx: Any) -> torch.Tensor:
    """The input again."""
    (kept,) = ctx.saved_tensors
    return kept if ctx.make is None else ctx.make(kept)  # type: ignore[no-any-return]


class _ColumnLinear(torch.autograd.Function):
    """y = x W^T + b on this rank's rows of W; x is whole on every rank, or a part of the sequence if `tp.sequence`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                tp: TensorParallel, remade: Remade | None = None) -> torch.Tensor:
        _keep_input(ctx, x, remade)
        ctx.weight, ctx.bias, ctx.tp = use(weight), bias, tp
        full = all_gather_sequence(x, tp) if tp.sequence and tp.group is not None else x
        return F.linear(full, weight, None if bias is None else use(bias))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Tensors, ...] | Tensors:  # type: ignore[override]
        weight, bias, tp = ctx.weight, ctx.bias, ctx.tp
        split = tp.sequence and tp.group is not None
        x = _kept_input(ctx)
        gathering = start_all_gather_sequence(x, tp) if split else None  # travels while x's gradient is computed
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        full = x if gathering is None else gathering.wait()
        summing: Pending | None = None  # travels while the weight's gradient is computed
        if grad_x is not None and split:
            grad_x, summing = start_reduce_scatter_sequence(grad_x, tp)
        elif grad_x is not None and tp.group is not None:
            summing = tp.group.start_all_reduce_(grad_x)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = accumulate_product(weight, rows, full.reshape(-1, full.shape[-1]))
        grad_bias = None if bias is None else accumulate(bias, rows.sum(0))
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, grad_bias, None, None


class _Linear(torch.autograd.Function):
    """y = x W^T, the weight's gradient added straight into the bucket."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, remade: Remade | None = None) -> torch.Tensor:
        _keep_input(ctx, x, remade)
        ctx.weight = use(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:  # type: ignore[override]
        x, weight = _kept_input(ctx), ctx.weight
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = accumulate_product(weight, grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight, None


class _Embedding(torch.autograd.Function):
    """weight[ids] with the gradient's rows added straight into the bucket. `outside` [batch, seq] is true where an id
    is none of this shard's rows, which gives zero; None where the shard is the whole."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(ids, outside)
        ctx.weight = use(weight)
        x = F.embedding(ids, weight)
        return x if outside is None else x.masked_fill_(outside.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:  # type: ignore[override]
        ids, outside = ctx.saved_tensors
        if outside is not None:
            grad = grad.masked_fill(outside.unsqueeze(-1), 0)
        return None, accumulate_rows(ctx.weight, grad.reshape(-1, grad.shape[-1]), ids.reshape(-1)), None


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight[ids] on a rank that holds all the rows; the gradient's rows are added straight into the bucket."""
    return _Embedding.apply(ids, weight, None)  # type: ignore[no-any-return]


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are split over tp. Its local weight may stack several logical tensors.

    Input [batch, seq, inputs] (or [batch, seq/tp, inputs] under sequence parallelism), output [batch, seq, outputs/tp].
    """

    def __init__(self, members: tuple[Member, ...], biases: tuple[Member, ...], *, inputs: int, std: float,
                 tp: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.tp = tp
        rows = members[-1].row + members[-1].rows
        self.weight = make_parameter((rows, inputs), Shard(members, std=std), dtype, device)
        self.bias = make_parameter((rows,), Shard(biases, fill=0.0), dtype, device) if biases else None

    def forward(self, x: torch.Tensor, remade: Remade | None = None) -> torch.Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.tp, remade)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        rows, inputs = self.weight.shape
        return f"{inputs} -> {rows * self.tp.size}/{self.tp.size}, rank {self.tp.rank}"


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are split over tp; the partial outputs are summed, then the bias is added.

    Input [batch, seq, inputs/tp], output [batch, seq, outputs] (or [batch, seq/tp, outputs]).
    """

    def __init__(self, name: str, inputs: int, outputs: int, *, bias: bool, std: float, tp: TensorParallel,
                 dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.tp = tp
        member = split_columns(f"{name}.weight", (outputs, inputs), tp.rank, tp.size)
        self.weight = make_parameter((outputs, inputs // tp.size), Shard((member,), std=std), dtype, device)
        self.bias = replicated(f"{name}.bias", outputs, 0.0, tp, dtype, device) if bias else None

    def forward(self, x: torch.Tensor, remade: Remade | None = None) -> torch.Tensor:
        y = leave(_Linear.apply(x, self.weight, remade), self.tp)  # [batch, seq or seq/tp, outputs]
        return y if self.bias is None else y + use(self.bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs * self.tp.size}/{self.tp.size} -> {outputs}, rank {self.tp.rank}"


class VocabParallelEmbedding(nn.Module):
    """Token embedding with its rows split over tp. ids [batch, seq] -> [batch, seq or seq/tp, hidden]."""

    def __init__(self, weight: nn.Parameter, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tp.group is None:
            return embed(ids, self.weight)
        rows = self.weight.shape[0]
        local = ids - self.tp.rank * rows
        outside = (local < 0) | (local >= rows)
        # What is another shard's adds zeros to rows of all numbers: to one row, they would queue there.
        local = torch.where(outside, ids % rows, local)
        return leave(_Embedding.apply(local, self.weight, outside), self.tp)

    def extra_repr(self) -> str:
        rows, hidden = self.weight.shape
        return f"{rows * self.tp.size}/{self.tp.size} x {hidden}, rank {self.tp.rank}"


class VocabParallelHead(nn.Module):
    """The output projection with its rows split over tp: [batch, seq or seq/tp, hidden] -> [batch, seq, vocab/tp].

    `vocab` is the true size of the vocabulary, `by` the implementation of the loss.
    """

    def __init__(self, weight: nn.Parameter, tp: TensorParallel, vocab: int, by: str) -> None:
        super().__init__()
        self.tp = tp
        self.weight = weight
        self.vocab = vocab
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ColumnLinear.apply(x, self.weight, None, self.tp, None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def loss(self, x: torch.Tensor, labels: torch.Tensor,
             scale: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss of each token [batch * seq], 0 where not supervised, and the gradient of `scale` times their sum for x
        [batch, seq or seq/tp, hidden]; the weight's gradient is added into its bucket. A scale of None: losses alone.
        """
        tp = self.tp
        gathered = tp.sequence and tp.group is not None
        full = all_gather_sequence(x, tp) if gathered else x
        training = scale is not None
        rows = full.reshape(-1, full.shape[-1])
        grad_x = torch.empty_like(rows) if training else None
        reduction = _InputGradient(tp, full.shape, grad_x)

        def add_weight_grad(logits_grad: torch.Tensor, chunk: torch.Tensor, grad: torch.Tensor | None) -> None:
            assert grad is not None
            reduction.start(grad)  # the other ranks' sums travel while the weight's gradient is computed
            add_product(self.weight, logits_grad, chunk)

        losses, grad = linear_cross_entropy(
            rows, use(self.weight), labels.reshape(-1), scale=scale or 0.0,
            first=tp.rank * self.weight.shape[0], vocab=self.vocab, group=tp.group, by=self.by,
            grad_x=False if grad_x is None else grad_x,
            add_weight_grad=add_weight_grad if training else None)
        if grad is None:
            return losses, None
        done(self.weight)
        return losses, reduction.finish()


class _InputGradient:
    """The sum over tp of the gradient of a column-parallel input that is computed in chunks of tokens, in order.
    `grad` [tokens, hidden] is where they come to stand, `shape` is the input's."""

    def __init__(self, tp: TensorParallel, shape: torch.Size, grad: torch.Tensor | None) -> None:
        self.tp = tp
        self.shape = shape
        self.grad = grad
        self.missing = shape.numel()
        self.pending: list[Pending] = []
        self.result: torch.Tensor | None = None if grad is None else grad.view(shape)

    def start(self, rows: torch.Tensor) -> None:
        """Begins the sum of the rows just computed: an all-reduce of each chunk, or a reduce-scatter once the last is
        there, since a rank's part of the sequence may be in any of them."""
        self.missing -= rows.numel()
        if self.tp.group is None:
            return
        if not self.tp.sequence:
            self.pending.append(self.tp.group.start_all_reduce_(rows))
        elif not self.missing:
            assert self.grad is not None
            self.result, pending = start_reduce_scatter_sequence(self.grad.view(self.shape), self.tp)
            self.pending.append(pending)

    def finish(self) -> torch.Tensor | None:
        """The sum, or this rank's part of the sequence of it."""
        for pending in self.pending:
            pending.wait()
        return self.result


def vocab_parameter(name: str, vocab: int, padded: int, hidden: int, *, std: float, tp: TensorParallel, tied: bool,
                    uses: int, primary: bool, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A [padded/tp, hidden] matrix over the vocabulary; padded rows are zero and belong to no logical tensor."""
    member = split_rows(name, (vocab, hidden), tp.rank, tp.size, padded=padded, primary=primary)
    return make_parameter((padded // tp.size, hidden), Shard((member,), std=std, tied=tied, uses=uses), dtype, device)


def replicated(name: str, size: int, fill: float, tp: TensorParallel, dtype: torch.dtype,
               device: torch.device, partial: bool | None = None) -> nn.Parameter:
    """A vector every tp rank holds whole. Its gradient is partial over tp where each rank saw its own part only:
    under sequence parallelism, or always when `partial` says so (qk-norm: each rank has its own heads)."""
    split = tp.sequence if partial is None else partial
    member = whole(name, (size,), primary=tp.rank == 0, partial="tp" if split else None)
    return make_parameter((size,), Shard((member,), fill=fill), dtype, device)
