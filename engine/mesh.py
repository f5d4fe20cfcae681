"""Where a rank stands: one grid of ranks with axes pp, dp, cp, tp (tp fastest); every group is a slice of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Layout
from engine.parallel.comm import Comm, TorchComm
from engine.parallel.heart import Heart
from engine.parallel.shared import share

AXES = ("pp", "dp", "cp", "tp")


def rank_grid(layout: Layout) -> np.ndarray:
    """The ranks laid out as [pp, dp, cp, tp]; tp neighbours are adjacent ranks, pipeline stages are far apart."""
    return np.arange(layout.world).reshape([getattr(layout, axis) for axis in AXES])


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the grid and the groups that run through it.

    A group is None where it would hold one rank (its collectives are then the identity). Besides the axes there are
    `world`, `edge` (first and last stage, for a tied embedding), `kv` (the tp ranks that hold the same kv heads) and
    `model` (the ranks of one copy of the model). `channels` carry messages between neighbouring stages: `ahead:A>B`
    and `back:A>B` for ranks A and B. `heart` is told by all of them when this rank waits.
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


def slices(layout: Layout, kv_heads: int) -> dict[str, list[list[int]]]:
    """For every named group, the rank lists it consists of; lists of one rank are left out.

    kv heads repeat when tp exceeds them: the ranks of one tp group that hold the same head form a `kv` group.
    """
    grid = rank_grid(layout)
    found: dict[str, list[list[int]]] = {}
    for dim, axis in enumerate(AXES):
        found[axis] = np.moveaxis(grid, dim, -1).reshape(-1, grid.shape[dim]).tolist()
    found["edge"] = np.moveaxis(grid, 0, -1).reshape(-1, layout.pp)[:, [0, -1]].tolist() if layout.pp > 1 else []
    replicas = max(1, layout.tp // kv_heads)
    found["kv"] = grid.reshape(-1, replicas).tolist()
    found["model"] = np.moveaxis(grid, 1, 0).reshape(layout.dp, -1).tolist()
    found["world"] = [grid.reshape(-1).tolist()]
    return {name: [ranks for ranks in lists if len(ranks) > 1] for name, lists in found.items()}


def neighbours(layout: Layout) -> list[list[int]]:
    """The pairs (stage, next stage) that exchange activations, the last stage and the first included (interleaving)."""
    if layout.pp == 1:
        return []
    columns = np.moveaxis(rank_grid(layout), 0, -1).reshape(-1, layout.pp)
    return [[int(column[s]), int(column[(s + 1) % layout.pp])] for column in columns for s in range(layout.pp)]


def build_mesh(layout: Layout, rank: int, kv_heads: int, timeout: timedelta, *, shared: bool = True,
               heart: Heart | None = None) -> Mesh:
    """The mesh of this rank. Where ranks of one machine compute on CPUs, groups of them go through shared memory unless
    `shared` is False; all others are groups of torch.distributed, which every rank creates in the same order."""
    coords = place(layout, rank)
    heart = heart or Heart()
    if layout.world == 1:
        return Mesh(layout, rank, coords, heart=heart)
    named = slices(layout, kv_heads)
    hosts = list(range(layout.world))
    groups: dict[str, Comm] = {}
    if shared and sys.platform == "linux" and dist.get_backend() == "gloo":
        hosts, groups = share(named, rank, layout.world, timeout.total_seconds(), heart)
    for name, lists in named.items():
        for ranks in lists:
            if len({hosts[r] for r in ranks}) > 1:
                group = dist.group.WORLD if name == "world" else dist.new_group(ranks, timeout=timeout)
                heart.beat()
                if rank in ranks:
                    groups[name] = TorchComm(ranks, rank, group, heart)
    return Mesh(layout, rank, coords, groups, open_channels(layout, rank, timeout, heart), heart)


def open_channels(layout: Layout, rank: int, timeout: timedelta, heart: Heart) -> dict[str, dist.ProcessGroup]:
    """One process group a direction: a send ahead and a send back between two stages then never wait for each other.

    Each channel carries one message now. NCCL connects two ranks at their first message, and that call returns when
    both have made it; the executor posts receives long before their sends, so two stages could wait for each other.
    All ranks go through the channels in one order, so none waits here for a rank that waits for it.
    """
    channels = {}
    for pair in neighbours(layout):
        for direction, (source, target) in (("ahead", pair), ("back", pair[::-1])):
            group = dist.new_group(pair, timeout=timeout)
            heart.beat()
            if rank not in pair:
                continue
            channels[f"{direction}:{pair[0]}>{pair[1]}"] = group
            message = torch.zeros(1, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
            if rank == source:
                dist.send(message, dst=target, group=group)
            else:
                dist.recv(message, src=source, group=group)
    return channels
