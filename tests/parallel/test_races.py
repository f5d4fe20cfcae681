"""No layout reads a result before its collective has ended, or touches what is still being sent; on both transports."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import race
import test_parity
import toys

from engine.comm.comm import Comm

CASES = [("llama", "tp2-pp2-dp2-sp"), ("llama", "tp2-dp2"), ("gpt2", "tp4-sp"), ("gpt2", "pp2-dp2"),
         ("llama-tied", "dp2"), ("qwen3", "tp2-sp-recompute"), ("gpt2", "pp2-interleaved"),
         ("qwen3", "tp2-sp-selective")]


def raced(rank: int, world: int, flags: str, steps: int, shared: bool) -> Any:
    """On a rank: test_parity's run, with every group watched for races."""
    config = toys.make_config(flags)
    mesh = toys.make_mesh(config, rank, world, shared=shared)
    groups = {name: race.RaceComm(group) for name, group in mesh.groups.items()}
    assert {group.via for group in groups.values()} <= ({"shared memory"} if shared else {"gloo"})
    result = test_parity.run_engine(toys.make_engine(config, rank, world, replace(mesh, groups=groups)), steps)
    assert {name: group.unwaited for name, group in groups.items() if group.unwaited} == {}
    return result


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "gloo"])
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_run_under_watch_equals_one_process(ranks: Any, model: str, layout: str, shared: bool) -> None:
    world, flags = test_parity.LAYOUTS[layout]
    one = ranks(1, test_parity.run, flags=toys.MODELS[model], steps=3)[0]
    found = ranks(world, raced, flags=f"{toys.MODELS[model]} {flags}", steps=3, shared=shared)
    test_parity.compare(found, one, 1e-10, 1e-10)


class Instant(Comm):
    """A group of one, whose collectives have ended when they start."""

    def start_all_reduce_(self, x: torch.Tensor, op: str = "sum") -> Any:
        return self

    def start_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Any:
        out.copy_(flat)
        return self

    start_all_gather = start_reduce_scatter

    def wait(self) -> None:
        """Has ended."""


@pytest.mark.parametrize("name", ["start_all_gather", "start_reduce_scatter"])
def test_a_race_is_found(name: str) -> None:
    group = race.RaceComm(Instant([0], 0))
    out, flat = torch.zeros(3), torch.arange(3.0)
    work = getattr(group, name)(out, flat)
    assert out.isnan().all() and group.unwaited == 1
    work.wait()
    assert out.equal(flat) and group.unwaited == 0
    work = getattr(group, name)(out, flat)
    flat[1] = 7
    with pytest.raises(AssertionError, match="an input was changed"):
        work.wait()
    work = getattr(group, name)(out, flat)
    out[0] = 1
    with pytest.raises(AssertionError, match="an output was written"):
        work.wait()
    counts = torch.ones(2, dtype=torch.int64)
    work = group.start_all_reduce_(counts)
    assert counts.min() < 0
    work.wait()
    assert counts.tolist() == [1, 1]
