"""What a group of ranks can do together: one small interface for the whole engine, and torch.distributed behind it.

`engine/comm/local/shared.py` has the other implementation, for ranks on one machine without GPUs; the mesh chooses.
Collectives of one group must be started in the same order on all its ranks, and their tensors left alone until `wait`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from engine.comm.heart import Heart, Waited

# torch 2.13 renamed these two and warns about the old names; 2.11 knows the old names alone.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Returns when the result is there (on a GPU: when the stream's next kernel will see it)."""
        ...


class Comm(ABC):
    """A group of ranks. `ranks` are global, `rank` is this process's place among them; `via` is what carries it all."""

    via = ""

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
        """Puts the sum (or "max") over the group into the contiguous x: the same bits on all ranks."""
        self.start_all_reduce_(x, op).wait()

    @abstractmethod
    def start_all_reduce_(self, x: torch.Tensor, op: str = "sum") -> Pending:
        """Begins `all_reduce_`."""

    @abstractmethod
    def start_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Pending:
        """Begins: `flat`, a partial sum of size * n elements on each rank -> this rank's n elements of the sum, in
        `out`. Both are contiguous and do not overlap."""

    @abstractmethod
    def start_all_gather(self, out: torch.Tensor, flat: torch.Tensor) -> Pending:
        """Begins: n elements on each rank -> all size * n elements, by rank, in `out`. Both are contiguous."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.ranks[self.rank]} of {list(self.ranks)})"


class TorchComm(Comm):
    """A process group of torch.distributed: NCCL, or gloo."""

    def __init__(self, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None,
                 heart: Heart | None = None) -> None:
        super().__init__(ranks, rank)
        self.group = group
        self.heart = heart or Heart()
        self.via = dist.get_backend(group)

    def start_all_reduce_(self, x: torch.Tensor, op: str = "sum") -> Pending:
        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        return Waited(dist.all_reduce(x, op=kind, group=self.group, async_op=True), self.heart)

    def start_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Pending:
        return Waited(reduce_scatter_flat(out, flat, group=self.group, async_op=True), self.heart)

    def start_all_gather(self, out: torch.Tensor, flat: torch.Tensor) -> Pending:
        return Waited(all_gather_flat(out, flat, group=self.group, async_op=True), self.heart)
