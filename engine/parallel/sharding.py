"""Logical tensors: which rectangle of which logical tensor each local parameter holds.

One description on each parameter (`parameter.shard`) drives initialisation, checkpoints, resharding, the converter,
gradient-norm deduplication, the sharded optimizer and the planner. Nothing guesses from names.

A local parameter is a stack of members along dim 0 (qkv holds three, gate-up two, most hold one); a member is a
rectangle of one logical tensor, plus padding rows that no logical tensor has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

Span = tuple[int, int]


@dataclass(frozen=True)
class Member:
    """One logical tensor's part of a local parameter.

    `name`, `shape`: the logical tensor, unpadded. `start`, `extent`: the rectangle held here, cut at the logical
    tensor's edge. `row`, `rows`: where it stands in the local parameter's dim 0, padding rows included.
    `primary`: the one copy that counts in norms and is written to checkpoints. `partial`: the mesh group over which
    the gradient computed here is only a part of the sum ("tp", "kv", or None).
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]
    row: int
    rows: int
    primary: bool = True
    partial: str | None = None


@dataclass(frozen=True)
class Shard:
    """The members of a parameter, and whether a tied copy of it lives on another stage."""

    members: tuple[Member, ...]
    std: float = 0.0
    """Standard deviation of the initial values; 0 with `fill` for constants."""
    fill: float | None = None
    """Constant initial value (norms 1, biases 0)."""
    tied: bool = False
    """The embedding shared with the head of another stage: gradients are summed over both stages."""
    replicas: str = "dp"
    """The mesh group whose ranks hold copies of the parameter: its gradients are summed over them, and each updates an
    equal part of its rows."""
    uses: int = 1
    """Gradients one backward pass adds: 2 for an embedding that is the same stage's head too."""


def make_parameter(shape: Sequence[int], shard: Shard, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter of zeros with its description. Initialisation or a checkpoint fills what belongs to logical tensors;
    padding rows belong to none, and what they hold would come back as NaN in the gradients."""
    parameter = nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))
    parameter.shard = shard  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: torch.Tensor) -> Shard:
    """The description on a parameter; every parameter of ours has one."""
    return cast(Shard, parameter.shard)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Piece:
    """A rectangle [start, start + extent) of a logical tensor, and the local rows [low, high) that hold it."""

    member: Member
    rows: Span
    start: tuple[int, ...]
    extent: tuple[int, ...]


def pieces(shard: Shard, low: int, high: int) -> Iterator[Piece]:
    """The pieces of logical tensors in local rows [low, high); padding rows belong to none."""
    for member in shard.members:
        first = max(low, member.row)
        last = min(high, member.row + member.extent[0])
        if first < last and all(member.extent):
            moved = member.start[0] + first - member.row
            yield Piece(member, (first, last), (moved, *member.start[1:]), (last - first, *member.extent[1:]))


def split_rows(name: str, shape: Sequence[int], part: int, parts: int, *, row: int = 0, padded: int | None = None,
               primary: bool = True, partial: str | None = None) -> Member:
    """The member of a tensor cut along dim 0 into `parts` equal parts, of which this is number `part`.

    `padded` is dim 0 with its padding rows, which stand at the end of the last parts.
    """
    total = shape[0] if padded is None else padded
    rows = total // parts
    low = min(part * rows, shape[0])
    high = min(low + rows, shape[0])
    return Member(name, tuple(shape), (low, *(0 for _ in shape[1:])), (high - low, *shape[1:]), row, rows,
                  primary, partial)


def split_columns(name: str, shape: Sequence[int], part: int, parts: int) -> Member:
    """The member of a matrix cut along dim 1 into `parts` equal parts, of which this is number `part`."""
    columns = shape[1] // parts
    return Member(name, tuple(shape), (0, part * columns), (shape[0], columns), 0, shape[0])


def whole(name: str, shape: Sequence[int], *, primary: bool, partial: str | None = None) -> Member:
    """The member of a tensor that every tp rank holds whole; `primary` on one of them."""
    return Member(name, tuple(shape), tuple(0 for _ in shape), tuple(shape), 0, shape[0], primary, partial)


@dataclass(frozen=True)
class Entry:
    """One rectangle of a checkpoint and the local memory that holds it.

    `kind` is model, master, exp_avg or exp_avg_sq; `tensor` has the shape `piece.extent` and is a view: saving reads
    it (where `piece.member.primary`), loading fills it.
    """

    kind: str
    piece: Piece
    tensor: torch.Tensor

    @property
    def name(self) -> str:
        """The name in a manifest: kind and logical name."""
        return f"{self.kind}/{self.piece.member.name}"
