"""Groups of ranks reduce, scatter and gather what the plain sum gives, through shared memory and through gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.comm.comm import Comm, TorchComm
from engine.comm.local import meeting, shared
from engine.comm.local.shared import CHUNK, SharedComm, combine
from engine.config import Layout
from engine.mesh import Mesh, build_mesh

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
SIZES = (0, 1, 2, 3, 5, 1000, 4099)
ROOT = Path(__file__).parents[2]


def mesh_of(rank: int, world: int, *, tp: int = 1, pp: int = 1, shared: bool = True) -> Mesh:
    """A mesh over all ranks of the job."""
    layout = Layout(tp=tp, pp=pp, dp=world // tp // pp, cp=1)
    return build_mesh(layout, rank, 1, timedelta(seconds=20), shared=shared)


def group_of(mesh: Mesh, name: str = "world", kind: type[Comm] = SharedComm) -> Comm:
    """A group of the mesh, of the kind that the test means."""
    group = mesh.group(name)
    assert type(group) is kind, group
    return group


def numbers(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """The same on every rank for the same arguments; sums of floats round."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype is torch.int64:
        return torch.randint(-1 << 40, 1 << 40, (count,), generator=generator)
    return torch.randn(count, dtype=torch.float64, generator=generator).to(dtype)


def plain(parts: list[torch.Tensor], op: str = "sum") -> torch.Tensor:
    """Reduced in the order of the ranks, half precision in fp32 and rounded once."""
    wide = [part.float() if part.dtype is torch.bfloat16 else part for part in parts]
    total = wide[0].clone()
    for part in wide[1:]:
        total = total + part if op == "sum" else torch.maximum(total, part)
    return total.to(parts[0].dtype)


def check(group: Comm, count: int, dtype: torch.dtype, *, exact: bool = True) -> list[torch.Tensor]:
    """Every operation against the plain one; returns the results that must be alike on all ranks."""
    world = group.size
    parts = [numbers(r, count, dtype) for r in range(world)]
    alike = []
    for op in ("sum", "max"):
        x = parts[group.rank].clone()
        group.all_reduce_(x, op)
        same(x, plain(parts, op), exact or op == "max")
        alike.append(x)
    flats = [numbers(r, count * world, dtype, 1) for r in range(world)]
    out = torch.empty(count, dtype=dtype)
    group.start_reduce_scatter(out, flats[group.rank]).wait()
    same(out, plain(flats)[group.rank * count : (group.rank + 1) * count], exact)
    whole = torch.empty(count * world, dtype=dtype)
    group.start_all_gather(whole, parts[group.rank]).wait()
    assert whole.equal(torch.cat(parts))
    return [*alike, whole]


def same(found: torch.Tensor, wanted: torch.Tensor, exact: bool) -> None:
    if exact:
        assert found.equal(wanted), (found - wanted).abs().max()
    else:
        torch.testing.assert_close(found, wanted)


def run_every_operation(rank: int, world: int) -> Any:
    """On a rank: all operations, types and small sizes."""
    group = group_of(mesh_of(rank, world))
    return [[t.tolist() for t in check(group, count, dtype)] for dtype in DTYPES for count in SIZES]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_operation_equals_the_plain_one_and_is_alike_on_all_ranks(ranks: Any, world: int) -> None:
    results = ranks(world, run_every_operation)
    assert all(result == results[0] for result in results)


def run_boundaries(rank: int, world: int) -> None:
    """On a rank: sizes at the edges of a chunk, of the short way and of several chunks; then one of real chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "CHUNK", 1 << 12)
        patch.setattr(shared, "SMALL", 1 << 9)
        group = group_of(mesh_of(rank, world))
        for dtype in DTYPES:
            elements = (1 << 12) // dtype.itemsize
            for size in (elements // world, elements, 2 * elements, 5 * elements, (1 << 9) // dtype.itemsize):
                for count in (size - 1, size, size + 1):
                    check(group, count, dtype)
    check(group_of(mesh_of(rank, world)), CHUNK // 4 + 3, torch.float32)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_messages_longer_than_a_chunk(ranks: Any, world: int) -> None:
    ranks(world, run_boundaries)


def run_gloo(rank: int, world: int) -> None:
    """On a rank: the same through torch.distributed."""
    group = group_of(mesh_of(rank, world, shared=False), kind=TorchComm)
    for dtype in (torch.float64, torch.float32, torch.int64):
        for count in (1, 5, 1000):
            check(group, count, dtype, exact=dtype is torch.int64)


def test_gloo_gives_the_same(ranks: Any) -> None:
    ranks(3, run_gloo)


def run_crossed(rank: int, world: int) -> None:
    """On a rank of a 2 x 2 grid: collectives of two groups, started and waited for in an order that differs by rank."""
    mesh = mesh_of(rank, world, tp=2)
    tp, dp, everyone = (group_of(mesh, name) for name in ("tp", "dp", "world"))
    count = 3 * CHUNK // 4 + 1
    for turn in range(3):
        jobs = [(group, [numbers(r, count, torch.float32, turn) for r in group.ranks]) for group in (tp, dp, everyone)]
        order = [(i + rank) % 3 for i in range(3)]
        started = {}
        for i in order:
            group, parts = jobs[i]
            x = parts[group.rank].clone()
            started[i] = (x, group.start_all_reduce_(x))
        small = numbers(rank, 7, torch.float64, turn)
        dp.all_reduce_(small)
        assert small.equal(plain([numbers(r, 7, torch.float64, turn) for r in dp.ranks]))
        for i in reversed(order):
            x, pending = started[i]
            pending.wait()
            assert x.equal(plain(jobs[i][1]))


def test_groups_may_be_waited_for_in_different_order_on_each_rank(ranks: Any) -> None:
    ranks(4, run_crossed)


def run_under_way(rank: int, world: int) -> None:
    """On a rank: many collectives of one group under way at once, waited for last to first, one of them twice."""
    group = group_of(mesh_of(rank, world))
    counts = [10, CHUNK // 4 + 5, 0, 3 * CHUNK // 4, 1]
    parts = [[numbers(r, count, torch.float32, i) for r in range(world)] for i, count in enumerate(counts)]
    mine = [part[rank].clone() for part in parts]
    pending = [group.start_all_reduce_(x) for x in mine]
    if rank == 0:
        time.sleep(0.05)
    for i in (4, 1, 0, 0, 2, 3):
        pending[i].wait()
        assert mine[i].equal(plain(parts[i]))


def test_several_collectives_of_one_group_under_way(ranks: Any) -> None:
    ranks(3, run_under_way)


def run_late(rank: int, world: int, late: int) -> Any:
    """On a rank: one never comes to the collective; what the others' error says."""
    mesh = build_mesh(Layout(tp=1, pp=1, dp=world, cp=1), rank, 1, timedelta(seconds=0.5))
    if rank == late:
        time.sleep(1.5)  # alive, its sockets open
        return mesh.group("dp") is None
    with pytest.raises(shared.PeerLost) as caught:
        group_of(mesh).all_reduce_(torch.ones(3))
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named(ranks: Any) -> None:
    assert ranks(2, run_late, late=1) == ["no data from rank 1 within 0.5 s", False]


def run_without_memory(rank: int, world: int) -> Any:
    """On a rank: the first one cannot make the memory."""
    if rank == 0:
        def refuse(*_: Any) -> int:
            raise OSError("out of memory")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "memfd_create", refuse)
            mesh = mesh_of(rank, world)
    else:
        mesh = mesh_of(rank, world)
    check(group_of(mesh, kind=TorchComm), 5, torch.int64)


def test_where_memory_cannot_be_shared_all_ranks_take_gloo(ranks: Any) -> None:
    ranks(3, run_without_memory)


def run_machines(rank: int, world: int) -> Any:
    """On a rank of four, two on each of two machines (their numbers are invented): which transport each group has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "machine", lambda: rank // 2)
        mesh = mesh_of(rank, world, tp=2)
    check(group_of(mesh, "tp"), 100, torch.float32)
    check(group_of(mesh, "dp", TorchComm), 100, torch.float32)
    check(group_of(mesh, "world", TorchComm), 100, torch.int64)


def test_only_groups_on_one_machine_share_memory(ranks: Any) -> None:
    ranks(4, run_machines)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_combined_in_order(dtype: torch.dtype) -> None:
    parts = [numbers(r, 33, dtype) for r in range(5)]
    out = torch.empty_like(parts[0])
    combine(parts, torch.add, out)
    assert out.equal(plain(parts))


MORTAL = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from engine.config import Layout
from engine.mesh import build_mesh

store, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
group = build_mesh(Layout(tp=1, pp=1, dp=world, cp=1), rank, 1, timedelta(seconds=60)).group("world")
x = torch.ones(1 << 20)
for step in range(1000):
    if step == 3:
        print("ready", flush=True)
    if step == 5 and rank == 1:
        time.sleep(1000)
    group.all_reduce_(x)
"""


def test_a_killed_rank_is_named_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    memory, temp = Path("/dev/shm"), tmp_path / "temp"
    temp.mkdir()
    before = set(memory.glob("*"))
    processes = [subprocess.Popen([sys.executable, "-c", MORTAL, str(tmp_path / "store"), str(rank), "3"], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                                  env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temp)}) for rank in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        os.kill(processes[1].pid, signal.SIGKILL)
        began = time.monotonic()
        said = [processes[rank].communicate(timeout=20)[1] for rank in (0, 2)]
        assert time.monotonic() - began < 10
        assert "PeerLost: rank 1 is gone" in said[0] + said[1], said
        assert all("PeerLost" in text for text in said), said
        assert not [*temp.iterdir()] and set(memory.glob("*")) <= before
    finally:
        for process in processes:
            process.kill()
            process.communicate()
