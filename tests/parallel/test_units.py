"""The parts that parity stands on, each by itself: the rank grid, initial weights, buckets of whole rows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.config import Layout
from engine.mesh import AXES, Mesh, build_mesh, neighbours, place, rank_grid, slices
from engine.parallel.buckets import GradientBuckets, Replicas
from engine.parallel.init import initialize, normals
from engine.parallel.sharding import (
    Member,
    Shard,
    make_parameter,
    pieces,
    shard_of,
    split_columns,
    split_rows,
    whole,
)

sizes = st.integers(1, 6)
layouts = st.builds(Layout, pp=sizes, dp=sizes, cp=st.integers(1, 2), tp=st.sampled_from([1, 2, 4, 8]))
CPU = torch.device("cpu")


@given(layouts)
def test_the_groups_of_every_axis_partition_the_world(layout: Layout) -> None:
    found = slices(layout, kv_heads=2)
    for axis in ("dp", "cp", "tp", "model"):
        size = layout.world // layout.dp if axis == "model" else getattr(layout, axis)
        lists = found.get(axis, [])
        members = [rank for ranks in lists for rank in ranks]
        assert sorted(members) == (list(range(layout.world)) if size > 1 else []), axis
        assert all(len(ranks) == size and ranks == sorted(ranks) for ranks in lists), axis


@given(layouts, st.data())
def test_a_group_holds_the_ranks_that_differ_in_its_axis_alone(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    here = place(layout, rank)
    mesh = Mesh(layout, rank, here)
    assert mesh.peer() == rank and rank_grid(layout)[tuple(here[axis] for axis in AXES)] == rank
    for axis in ("dp", "cp", "tp"):
        mine = [ranks for ranks in slices(layout, 2).get(axis, []) if rank in ranks]
        expected = [mesh.peer(**{axis: i}) for i in range(getattr(layout, axis))]
        assert mine == ([expected] if len(expected) > 1 else [])
    assert str(mesh).startswith(f"{layout} · rank {rank} = ")


@given(layouts, st.sampled_from([1, 2, 4, 8]))
def test_ranks_of_a_kv_group_hold_the_same_heads(layout: Layout, kv_heads: int) -> None:
    groups = slices(layout, kv_heads).get("kv", [])
    assert bool(groups) == (layout.tp > kv_heads)
    for ranks in groups:
        places = [place(layout, rank) for rank in ranks]
        assert len({(p["pp"], p["dp"], p["cp"]) for p in places}) == 1
        assert len({p["tp"] * kv_heads // layout.tp for p in places}) == 1, "the first kv head of each"
        assert len(ranks) == layout.tp // kv_heads


@given(layouts)
def test_neighbouring_stages_form_rings(layout: Layout) -> None:
    sets = neighbours(layout)
    pairs = [pair for some in sets for pair in some]
    assert len(pairs) == (layout.world if layout.pp > 1 else 0)
    open_ends = [pair for some in neighbours(layout, wraps=False) for pair in some]
    assert all(pair in pairs for pair in open_ends)
    assert len(open_ends) == layout.world // layout.pp * (layout.pp - 1)
    for some in sets:
        ranks = [rank for pair in some for rank in pair]
        assert len(ranks) == len(set(ranks)), "no rank stands in two pairs of a set"
    for a, b in pairs:
        here, there = place(layout, a), place(layout, b)
        assert there == {**here, "pp": (here["pp"] + 1) % layout.pp}
    edges = slices(layout, 1).get("edge", [])
    assert bool(edges) == (layout.pp > 1) and "edge" not in slices(layout, 1, tied=False)
    assert all(place(layout, a)["pp"] == 0 and place(layout, b)["pp"] == layout.pp - 1 for a, b in edges)


@pytest.mark.parametrize(("layout", "kv_heads", "calls"), [
    (Layout(tp=8, pp=4, dp=8), 8, 7), (Layout(tp=8, pp=8, dp=16), 4, 8), (Layout(tp=8, pp=16, dp=32), 4, 8),
    (Layout(tp=8, pp=3, dp=8), 8, 7), (Layout(dp=4096), 8, 1)])
def test_so_many_meetings_of_the_world_make_all_groups_however_large_it_is(
        layout: Layout, kv_heads: int, calls: int) -> None:
    made: list[list[list[int]]] = []

    def count(lists: Any, timeout: timedelta) -> dist.ProcessGroup | None:
        made.append(lists)
        return dist.group.WORLD

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    try:
        wrapped = build_mesh(layout, 0, kv_heads, timedelta(seconds=1), make=count)
        assert len(made) <= 11
        made.clear()
        mesh = build_mesh(layout, 0, kv_heads, timedelta(seconds=1), make=count, tied=False, wraps=False)
    finally:
        dist.destroy_process_group()
    assert len(made) == calls, "tp, dp, model, kv where heads repeat, and two directions of two sets of neighbours"
    for lists in made:
        assert len({rank for ranks in lists for rank in ranks}) == sum(map(len, lists)), "a split has no overlaps"
    assert len(wrapped.channels) == (4 if layout.pp > 1 else 0) and len(mesh.channels) == (2 if layout.pp > 1 else 0)
    assert (wrapped.group("edge") is not None) == (layout.pp > 1) and mesh.group("edge") is None


def test_tp_neighbours_are_adjacent_ranks() -> None:
    assert rank_grid(Layout(pp=2, dp=2, tp=2)).tolist() == [[[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]]


NAME = "model.layers.0.self_attn.q_proj.weight"


def test_initial_weights_never_change_in_silence() -> None:
    first = normals(1234, NAME, 0, 6).astype(np.float32)
    assert [float(x).hex() for x in first] == [
        "0x1.9677320000000p-2", "-0x1.e13f3c0000000p+0", "0x1.17c4800000000p-3", "0x1.eb69c00000000p-2",
        "-0x1.4ee4d20000000p-1", "-0x1.0418140000000p+0"]
    later = normals(1234, NAME, 1_000_003, 1_000_005).astype(np.float32)
    assert [float(x).hex() for x in later] == ["0x1.2b94ca0000000p-8", "0x1.2bbd7c0000000p+0"]


@given(st.integers(0, 2**64 - 1), st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**40))
def test_a_slice_of_the_stream_is_that_of_the_whole(seed: int, low: int, count: int, base: int) -> None:
    whole_stream = normals(seed, NAME, base, base + 600)
    assert np.array_equal(normals(seed, NAME, base + low, base + low + count), whole_stream[low : low + count])


def test_the_stream_is_normal_and_streams_are_unlike() -> None:
    x, y, z = normals(1, NAME, 0, 200_000), normals(2, NAME, 0, 200_000), normals(1, f"{NAME}2", 0, 200_000)
    for sample in (x, y, z):
        assert abs(sample.mean()) < 0.01 and abs(sample.std() - 1) < 0.01
        assert abs((sample**3).mean()) < 0.03 and abs((sample**4).mean() - 3) < 0.1
        assert abs((np.abs(sample) < 1).mean() - 0.6827) < 0.005 and 4 < np.abs(sample).max() < 6.5
    for a, b in ((x, y), (x, z), (y, z), (x[:-1], x[1:]), (x[0::2], x[1::2])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.012


def filled(member: Member, rows: int, columns: int, std: float = 0.02) -> torch.Tensor:
    parameter = make_parameter((rows, columns), Shard((member,), std=std), torch.float64, CPU)
    initialize(parameter, 7)
    return parameter.detach()


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 2, 3, 4]))
def test_shards_by_rows_and_by_columns_are_cut_from_the_whole(rows: int, width: int, parts: int) -> None:
    columns = width * parts
    full = filled(split_rows("w", (rows, columns), 0, 1), rows, columns)
    side = [filled(split_columns("w", (rows, columns), i, parts), rows, width) for i in range(parts)]
    assert torch.equal(torch.cat(side, 1), full)
    padded = -(-rows // (4 * parts)) * 4 * parts
    each = padded // parts
    stack = torch.cat([filled(split_rows("w", (rows, columns), i, parts, padded=padded), each, columns)
                       for i in range(parts)])
    assert torch.equal(stack[:rows], full)
    assert not stack[rows:].any(), "padding is zero"


def test_a_parameter_starts_as_zeros_so_that_loading_leaves_no_garbage_in_the_padding() -> None:
    torch.full((64, 8), float("nan"))  # memory that an empty tensor would have been given
    assert not make_parameter((64, 8), Shard((split_rows("w", (50, 8), 0, 1, padded=64),)), torch.float64, CPU).any()


class Toy(nn.Module):
    """Matrices of two widths, vectors, a stack of two tensors, and padding rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = make_parameter((7, 4), Shard((split_rows("a", (7, 4), 0, 1),), std=1.0), torch.float32, CPU)
        fused = (split_rows("q", (3, 4), 0, 1), split_rows("k", (2, 4), 0, 1, row=3))
        self.b = make_parameter((5, 4), Shard(fused, std=1.0), torch.float32, CPU)
        self.c = make_parameter((6, 3), Shard((split_rows("c", (5, 3), 0, 1, padded=6),), std=1.0), torch.float32, CPU)
        self.d = make_parameter((5,), Shard((whole("d", (5,), primary=True),), fill=1.0), torch.float32, CPU)
        self.e = make_parameter((4, 4), Shard((split_rows("e", (4, 4), 0, 1),), std=1.0, tied=True), torch.float32, CPU)
        for parameter in self.parameters():
            initialize(parameter, 3)


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
def test_shards_are_whole_rows_and_cover_each_element_once(dp: int, limit: int) -> None:
    original = {name: parameter.detach().clone() for name, parameter in Toy().named_parameters()}
    counts = {"a": np.zeros((7, 4)), "q": np.zeros((3, 4)), "k": np.zeros((2, 4)), "c": np.zeros((5, 3)),
              "d": np.zeros(5), "e": np.zeros((4, 4))}
    for rank in range(dp):
        model = Toy()
        buckets = GradientBuckets(model, {"dp": Replicas(None, rank, dp)}, limit=limit).buckets
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, original[name]), "moving into the bucket changes nothing"
        for bucket in buckets:
            low, high = bucket.shard
            assert bucket.rows % dp == 0 and high - low == bucket.rows // dp
            assert bucket.rows - dp < sum(slot.rows for slot in bucket.slots) <= bucket.rows, "padding at the end only"
            assert len({slot.parameter.dim() > 1 for slot in bucket.slots}) == 1
            assert not bucket.tied or len(bucket.slots) == 1
            row = 0
            for slot in bucket.slots:
                assert slot.row == row and slot.parameter.is_contiguous()
                start = bucket.data.data_ptr() + row * bucket.width * bucket.data.element_size()
                assert slot.parameter.data_ptr() == start
                row += slot.rows
            for piece, span in bucket.shard_pieces():
                where = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.extent, strict=True))
                counts[piece.member.name][where] += 1
                assert (span.stop - span.start) == np.prod(piece.extent) and span.start % bucket.width == 0
                held = bucket.shard_data[span].view(piece.extent)
                parameter = next(s.parameter for s in bucket.slots if piece.member in shard_of(s.parameter).members)
                local = next(p for p in pieces(shard_of(parameter), 0, parameter.shape[0]) if p.member == piece.member)
                full = parameter[slice(*local.rows)]
                assert torch.equal(held, full[tuple(slice(a, a + n) for a, n in
                                                    zip(piece.start, piece.extent, strict=True))])
    for name, count in counts.items():
        assert (count == 1).all(), name


def test_gradients_gather_in_the_bucket_over_backward_passes() -> None:
    model = Toy()
    buckets = GradientBuckets(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for step in range(2):  # the second step starts anew
        buckets.start_step()
        for micro in range(3):
            if micro == 2:
                buckets.expect_last_backward()
            ((x @ model.a.t()).sum() + model.d.sum() * (step + 1)).backward()
        buckets.finish()
        torch.testing.assert_close(model.a.main_grad, 3 * x.sum(0).expand(7, 4))
        assert (model.d.main_grad == 3 * (step + 1)).all() and model.a.grad is None
        assert not model.b.main_grad.any(), "a gradient that never came is zero"
