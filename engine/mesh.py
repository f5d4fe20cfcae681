"""Where a rank stands: one grid of ranks with axes pp, dp, cp, tp (tp fastest); every group is a slice of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from engine.comm.comm import Comm, TorchComm
from engine.comm.heart import Heart
from engine.comm.local.shared import share
from engine.config import Layout

AXES = ("pp", "dp", "cp", "tp")


def rank_grid(layout: Layout) -> np.ndarray:
    """The ranks laid out as [pp, dp, cp, tp]; tp neighbours are adjacent ranks, pipeline stages are far apart."""
    return np.arange(layout.world).reshape([getattr(layout, axis) for axis in AXES])


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the grid and the groups that run through it.

    A group is None where it would hold one rank (its collectives are then the identity). Besides `dp`, `cp` and `tp`
    there are `world`, `edge` (first and last stage, for a tied embedding), `kv` (the tp ranks that hold the same kv
    heads) and `model` (the ranks of one copy of the model). `channels` carry messages between neighbouring stages:
    `ahead:A>B` and `back:A>B` for ranks A and B. `heart` is told by all of them when this rank waits.
    """

    layout: Layout
    rank: int
    coords: Mapping[str, int]
    groups: Mapping[str, Comm] = field(default_factory=dict)
    channels: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    heart: Heart = field(default_factory=Heart)

    def __getattr__(self, axis: str) -> int:
        """This rank's coordinate on an axis: `mesh.tp`, `mesh.pp`."""
        if axis in AXES:
            return self.coords[axis]
        raise AttributeError(axis)

    def group(self, name: str) -> Comm | None:
        """The group of this rank along an axis (or a named slice); None when it would hold one rank."""
        return self.groups.get(name)

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return int(getattr(self.layout, axis))

    def peer(self, **coords: int) -> int:
        """The global rank that stands where this one does but for the named coordinates: `mesh.peer(pp=0)`."""
        place = {**self.coords, **coords}
        return int(rank_grid(self.layout)[tuple(place[axis] for axis in AXES)])

    @property
    def transport(self) -> str:
        """What carries the collectives: "shared memory", or "shared memory (tp, kv), gloo (dp, world)"."""
        names: dict[str, list[str]] = {}
        for name, group in self.groups.items():
            names.setdefault(group.via, []).append(name)
        if len(names) == 1:
            return next(iter(names))
        return ", ".join(f"{via} ({', '.join(carried)})" for via, carried in names.items())

    def __str__(self) -> str:
        here = " ".join(f"{a}{self.coords[a]}" for a in AXES if self.size(a) > 1) or "alone"
        return f"{self.layout} · rank {self.rank} = {here}"


def place(layout: Layout, rank: int) -> dict[str, int]:
    """The coordinates of a rank."""
    where = np.argwhere(rank_grid(layout) == rank)[0]
    return dict(zip(AXES, (int(i) for i in where), strict=True))


def slices(layout: Layout, kv_heads: int, *, tied: bool = True) -> dict[str, list[list[int]]]:
    """For every named group but `world`, the rank lists it consists of; no rank stands in two lists of a name.

    kv heads repeat when tp exceeds them: the ranks of one tp group that hold the same head form a `kv` group. Without
    `tied` embeddings there is no `edge`. Stages exchange messages alone, so there is no group `pp`.
    """
    grid = rank_grid(layout)
    found = {axis: np.moveaxis(grid, AXES.index(axis), -1).reshape(-1, getattr(layout, axis)).tolist()
             for axis in ("dp", "cp", "tp")}
    replicas = max(1, layout.tp // kv_heads)
    found["kv"] = grid.reshape(-1, replicas).tolist()
    found["model"] = np.moveaxis(grid, 1, 0).reshape(layout.dp, -1).tolist()
    if tied and layout.pp > 1:
        found["edge"] = np.moveaxis(grid, 0, -1).reshape(-1, layout.pp)[:, [0, -1]].tolist()
    return {name: lists for name, lists in found.items() if len(lists[0]) > 1}


def neighbours(layout: Layout, *, wraps: bool = True) -> list[list[list[int]]]:
    """The pairs (stage, next stage) that exchange activations, in sets in which no rank stands twice: the pairs that
    begin at even stages, those at odd ones; `wraps`: the last stage and the first too (interleaving)."""
    if layout.pp == 1:
        return []
    columns = np.moveaxis(rank_grid(layout), 0, -1).reshape(-1, layout.pp)
    stages = range(layout.pp if wraps else layout.pp - 1)
    # An odd number of stages makes a ring that two sets cannot hold: its last pair is a set by itself.
    sets = [[s for s in stages if s % 2 == parity and (s, parity) != (layout.pp - 1, 0)] for parity in (0, 1)]
    sets.append([s for s in stages if s == layout.pp - 1 and s % 2 == 0])
    return [[[int(column[s]), int(column[(s + 1) % layout.pp])] for column in columns for s in some]
            for some in sets if some]


Make = Callable[[Sequence[Sequence[int]], timedelta], dist.ProcessGroup | None]
"""Makes groups of the given ranks, none of which stands in two lists: every rank calls it with the same lists, and gets
the group it is in, or None. Each call is one meeting of the whole world."""


def split(lists: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """All the groups by one ncclCommSplit. 256 GPUs have several hundred groups, and 11 calls make them."""
    return dist.split_group(split_ranks=[list(ranks) for ranks in lists], timeout=timeout)


def one_by_one(lists: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """The groups one after another, for backends that cannot split."""
    mine = None
    for ranks in lists:
        group = dist.new_group(list(ranks), timeout=timeout)
        mine = group if dist.get_rank() in ranks else mine
    return mine


def build_mesh(layout: Layout, rank: int, kv_heads: int, timeout: timedelta, *, tied: bool = True, wraps: bool = True,
               shared: bool = True, heart: Heart | None = None, make: Make | None = None) -> Mesh:
    """The mesh of this rank. Where ranks of one machine compute on CPUs, groups of them go through shared memory unless
    `shared` is False; all others are groups of torch.distributed, which all ranks create in the same order.

    `tied`, `wraps`: whether the model's embeddings are tied, and its stages virtual (see `slices`, `neighbours`).
    `make`: what creates groups; by default NCCL's are split off the world, and those of other backends made one by one.
    """
    coords = place(layout, rank)
    heart = heart or Heart()
    if layout.world == 1:
        return Mesh(layout, rank, coords, heart=heart)
    backend = dist.get_backend()
    make = make or (split if backend == "nccl" else one_by_one)
    named = {**slices(layout, kv_heads, tied=tied), "world": [list(range(layout.world))]}
    hosts = list(range(layout.world))
    groups: dict[str, Comm] = {}
    if shared and sys.platform == "linux" and backend == "gloo":
        hosts, groups = share(named, rank, layout.world, timeout.total_seconds(), heart)
    for name, lists in named.items():
        apart = [ranks for ranks in lists if len({hosts[r] for r in ranks}) > 1]
        if apart:
            group = dist.group.WORLD if name == "world" else make(apart, timeout)
            heart.beat()
            for ranks in apart:
                if rank in ranks:
                    groups[name] = TorchComm(ranks, rank, group, heart)
    channels = open_channels(neighbours(layout, wraps=wraps), rank, timeout, heart, make)
    return Mesh(layout, rank, coords, groups, channels, heart)


def open_channels(sets: Sequence[Sequence[Sequence[int]]], rank: int, timeout: timedelta, heart: Heart,
                  make: Make) -> dict[str, dist.ProcessGroup]:
    """One process group a direction of each pair in some sets of pairs: a send ahead and a send back between two stages
    then never wait for each other.

    Each channel carries one message now. NCCL connects two ranks at their first message, and that call returns when
    both have made it; the executor posts receives long before their sends, so two stages could wait for each other.
    All ranks go through the channels in one order, so none waits here for a rank that waits for it.
    """
    channels = {}
    for pairs in sets:
        for direction in ("ahead", "back"):
            group = make(pairs, timeout)
            heart.beat()
            for pair in pairs:
                if rank not in pair:
                    continue
                assert group is not None
                channels[f"{direction}:{pair[0]}>{pair[1]}"] = group
                source, target = pair if direction == "ahead" else pair[::-1]
                message = torch.zeros(1, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
                if rank == source:
                    dist.send(message, dst=target, group=group)
                else:
                    dist.recv(message, src=source, group=group)
    return channels
