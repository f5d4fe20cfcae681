"""Contiguous parameters and fp32 gradients, so that data parallelism moves few large messages and shards whole rows.

A bucket holds parameters of one row width (a row is one index of dim 0; in a 1-D parameter, one element). Its length is
padded, at its end only, to a multiple of dp rows: each dp rank's equal part is whole rows, and every parameter stays
one contiguous view. A tied embedding has a bucket of its own, alike on both stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from engine.comm.comm import Pending
from engine.kernels.language import wide
from engine.parallel.collectives import Group
from engine.parallel.gradients import collect
from engine.parallel.sharding import Piece, pieces, shard_of

BUCKET_ELEMENTS = 1 << 25
"""A bucket is closed at this size: 128 MB of fp32, large enough for bandwidth, small enough to overlap backward."""


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold copies of a parameter; a group of None holds one rank."""

    group: Group = None
    rank: int = 0
    size: int = 1


@dataclass
class Slot:
    """Where a parameter stands in its bucket: rows [row, row + rows)."""

    parameter: nn.Parameter
    row: int

    @property
    def rows(self) -> int:
        return int(self.parameter.shape[0])


@dataclass
class Bucket:
    """Parameters of one row width with their flat data and main gradients."""

    slots: list[Slot]
    width: int
    rows: int
    decay: bool
    tied: bool
    data: torch.Tensor
    grads: torch.Tensor
    replicas: Replicas
    waiting: int = 0
    pending: Pending | None = None
    gathering: Pending | None = None
    shard_grads: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        low, high = self.shard
        if self.replicas.group is None:
            self.shard_grads = self.grads
        else:
            self.shard_grads = torch.empty((high - low) * self.width, dtype=self.grads.dtype, device=self.grads.device)

    @property
    def shard(self) -> tuple[int, int]:
        """The rows that this rank updates."""
        each = self.rows // self.replicas.size
        return self.replicas.rank * each, (self.replicas.rank + 1) * each

    @property
    def shard_data(self) -> torch.Tensor:
        """This rank's rows of the parameters, flat."""
        low, high = self.shard
        return self.data[low * self.width : high * self.width]

    def reduce(self) -> None:
        """Starts the sum over the replicas: this rank's rows of it end in `shard_grads`."""
        for slot in self.slots:
            if slot.parameter.grad_empty:  # type: ignore[attr-defined]
                slot.parameter.main_grad.zero_()  # type: ignore[attr-defined]
        if self.replicas.group is not None:
            self.pending = self.replicas.group.start_reduce_scatter(self.shard_grads, self.grads)

    def gather(self) -> None:
        """Starts to give every replica the others' updated rows. Reads of the parameters wait for it by `arrive`."""
        if self.replicas.group is not None:
            self.gathering = self.replicas.group.start_all_gather(self.data, self.shard_data.clone())

    def arrive(self) -> None:
        """Returns when all rows of the parameters are there."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def shard_pieces(self) -> Iterator[tuple[Piece, slice]]:
        """The logical pieces in this rank's rows, with where they stand in the flat shard."""
        low, high = self.shard
        for slot in self.slots:
            for piece in pieces(shard_of(slot.parameter), low - slot.row, high - slot.row):
                first, last = (slot.row + r - low for r in piece.rows)
                yield piece, slice(first * self.width, last * self.width)


class GradientBuckets:
    """The buckets of one model chunk, and when they are reduced.

    Reduction starts by itself during the step's last backward pass, bucket by bucket as gradients become complete:
    call `expect_last_backward` before it, `finish` after it. `wide_products`: the device multiplies bf16 straight into
    the fp32 gradient.
    """

    def __init__(self, model: nn.Module, replicas: Mapping[str, Replicas] = MappingProxyType({}), *,
                 limit: int = BUCKET_ELEMENTS, wide_products: bool = False) -> None:
        """`replicas`: by the name that a parameter's shard gives; a name that is absent stands for this rank alone."""
        self.buckets = [self._build(group, replicas.get(shard_of(group[0]).replicas, Replicas()))
                        for group in _group(model.parameters(), limit)]
        self.armed = False
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(collect)
                slot.parameter.on_grad = _OnGrad(self, bucket)  # type: ignore[attr-defined]
                slot.parameter.wide_products = wide_products  # type: ignore[attr-defined]
                if bucket.replicas.group is not None:
                    slot.parameter.on_use = bucket.arrive  # type: ignore[attr-defined]
        self.start_step()

    @staticmethod
    def _build(parameters: Sequence[nn.Parameter], replicas: Replicas) -> Bucket:
        first = parameters[0]
        width = _width(first)
        rows = sum(p.shape[0] for p in parameters)
        padded = -(-rows // replicas.size) * replicas.size
        data = torch.zeros(padded * width, dtype=first.dtype, device=first.device)
        grads = torch.zeros(padded * width, dtype=wide(first.dtype), device=first.device)
        slots, row = [], 0
        for parameter in parameters:
            span = slice(row * width, (row + parameter.shape[0]) * width)
            data[span].copy_(parameter.detach().reshape(-1))
            parameter.data = data[span].view(parameter.shape)
            parameter.main_grad = grads[span].view(parameter.shape)  # type: ignore[attr-defined]
            slots.append(Slot(parameter, row))
            row += parameter.shape[0]
        return Bucket(slots, width, padded, first.dim() > 1, shard_of(first).tied, data, grads, replicas)

    def start_step(self) -> None:
        """Forgets the last step's gradients; the first new one overwrites them."""
        self.armed = False
        for bucket in self.buckets:
            bucket.pending = None
            for slot in bucket.slots:
                slot.parameter.grad_empty = True  # type: ignore[attr-defined]

    def expect_last_backward(self) -> None:
        """The next backward pass completes the step's gradients."""
        self.armed = True
        for bucket in self.buckets:
            bucket.waiting = sum(shard_of(slot.parameter).uses for slot in bucket.slots)

    def arrived(self, bucket: Bucket) -> None:
        """A parameter of the bucket has a gradient of this backward pass."""
        if self.armed:
            bucket.waiting -= 1
            if bucket.waiting == 0:
                bucket.reduce()

    def finish(self) -> None:
        """Waits until every bucket's sum over its replicas is there. A gradient that never came counts as zero."""
        for bucket in self.buckets:
            if bucket.waiting or not self.armed:
                bucket.reduce()
        for bucket in self.buckets:
            if bucket.pending is not None:
                bucket.pending.wait()


@dataclass(frozen=True)
class _OnGrad:
    """What a parameter calls when its gradient of one backward pass is in the bucket."""

    owner: GradientBuckets
    bucket: Bucket

    def __call__(self) -> None:
        self.owner.arrived(self.bucket)


def _width(parameter: torch.Tensor) -> int:
    return int(parameter.shape[1]) if parameter.dim() > 1 else 1


def _group(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Parameters by row width and replicas (matrices apart from vectors, tied ones by themselves), last layers first,
    cut at `limit`.

    The last layers' gradients are complete first, so their buckets travel while the rest is computed.
    """
    open_groups: dict[tuple[bool, int, str], list[nn.Parameter]] = {}
    done: list[list[nn.Parameter]] = []
    for parameter in reversed(list(parameters)):
        if shard_of(parameter).tied:
            done.append([parameter])
            continue
        key = (parameter.dim() > 1, _width(parameter), shard_of(parameter).replicas)
        group = open_groups.setdefault(key, [])
        group.append(parameter)
        if sum(p.numel() for p in group) >= limit:
            done.append(open_groups.pop(key))
    return done + list(open_groups.values())
