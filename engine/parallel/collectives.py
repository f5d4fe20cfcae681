"""Collectives with their conjugates: the backward of each is the other of its pair (Megatron-LM, arXiv:1909.08053,
section 3; sequence parallelism arXiv:2205.05198, section 4.2.2).

    forward            backward
    identity           all-reduce          into a tensor-parallel region
    all-reduce         identity            out of it: `all_reduce`
    all-gather         reduce-scatter      into it, activations split along the sequence
    reduce-scatter     all-gather          out of it: `scatter_sequence`

The two ways in are part of the column-parallel linear (`layers.py`), which computes the weight's gradient meanwhile.

A group of None holds one rank: everything is then the identity and costs nothing. Tensors are [batch, seq, hidden].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.comm.comm import Comm, Pending

Group = Comm | None


@dataclass(frozen=True)
class TensorParallel:
    """What a sharded layer needs to know of the tensor axis. `sequence` splits activations between the regions."""

    group: Group = None
    rank: int = 0
    size: int = 1
    sequence: bool = False

    def share(self, whole: int) -> int:
        """This rank's part of a dimension that divides."""
        return whole // self.size


@dataclass(frozen=True)
class Gathering:
    """An all-gather along the sequence under way; `mine` is what this rank gives, `parts` where all of it arrives."""

    mine: torch.Tensor
    parts: torch.Tensor
    pending: Pending

    def wait(self) -> torch.Tensor:
        """The whole, [batch, seq, hidden]."""
        self.pending.wait()
        batch, part, hidden = self.mine.shape
        by_sequence = self.parts.view(-1, batch, part, hidden).transpose(0, 1)
        return by_sequence.reshape(batch, -1, hidden)  # a view when batch is 1


def start_all_gather_sequence(x: torch.Tensor, tp: TensorParallel) -> Gathering:
    """Begins [batch, seq/tp, hidden] -> [batch, seq, hidden], no gradient."""
    assert tp.group is not None
    batch, part, hidden = x.shape
    mine, parts = x.contiguous(), x.new_empty(tp.size * batch, part, hidden)
    return Gathering(mine, parts, tp.group.start_all_gather(parts, mine))


def all_gather_sequence(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """[batch, seq/tp, hidden] -> [batch, seq, hidden], no gradient."""
    return start_all_gather_sequence(x, tp).wait()


def start_reduce_scatter_sequence(x: torch.Tensor, tp: TensorParallel) -> tuple[torch.Tensor, Pending]:
    """Begins [batch, seq, hidden], a partial sum on each rank -> [batch, seq/tp, hidden]; wait for it."""
    assert tp.group is not None
    batch, seq, hidden = x.shape
    part = seq // tp.size
    parts = x.view(batch, tp.size, part, hidden).transpose(0, 1).reshape(tp.size * batch, part, hidden)
    mine = x.new_empty(batch, part, hidden)
    return mine, tp.group.start_reduce_scatter(mine, parts)


def reduce_scatter_sequence(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """[batch, seq, hidden], a partial sum on each rank -> the sum's own part [batch, seq/tp, hidden], no gradient."""
    mine, pending = start_reduce_scatter_sequence(x, tp)
    pending.wait()
    return mine


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Comm) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        group.all_reduce_(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return reduce_scatter_sequence(x.contiguous(), tp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return all_gather_sequence(grad, ctx.tp), None


def all_reduce(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """All-reduce forward, identity backward: the shards' partial sums become one activation."""
    return x if tp.group is None else _AllReduce.apply(x, tp.group)  # type: ignore[no-any-return]


def scatter_sequence(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Reduce-scatter along the sequence forward, all-gather backward."""
    return x if tp.group is None else _ScatterSequence.apply(x, tp)  # type: ignore[no-any-return]


def leave(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Out of a tensor-parallel region: partial sums to one activation, split along the sequence if `tp.sequence`."""
    return scatter_sequence(x, tp) if tp.sequence else all_reduce(x, tp)
