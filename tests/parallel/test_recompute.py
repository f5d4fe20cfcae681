"""What the backward pass makes again has the bits that it would have kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Layout
from engine.kernels.dispatch import Kernels
from engine.mesh import AXES, Mesh
from engine.model import mlp, parts
from engine.train.engine import DTYPES, Engine
from tests.parallel import toys

STEPS = 3
KINDS = ("selective", "full:2", "full")
Results = tuple[list[tuple[float, float]], list[np.ndarray], list[np.ndarray]]


def results(engine: Engine, steps: int = STEPS) -> Results:
    """The curve of some steps, the last step's gradients, and the weights after it."""
    curve = toys.train(engine, steps)
    gradients = [bucket.shard_grads.double().numpy() for bucket in engine.optimizer.buckets]
    return curve, gradients, [bucket.data.double().numpy() for bucket in engine.optimizer.buckets]


def alone(flags: str, kernels: Kernels | None = None, steps: int = STEPS) -> Results:
    """The same on one process."""
    config = toys.make_config(flags)
    engine = Engine(config, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), torch.device("cpu"),
                    DTYPES[config.runtime.dtype], kernels)
    engine.initialize()
    return results(engine, steps)


def run(rank: int, world: int, flags: str) -> Results:
    """The same on a rank."""
    return results(toys.make_engine(toys.make_config(flags), rank, world))


def assert_same_bits(found: Results, wanted: Results) -> None:
    assert found[0] == wanted[0]
    for one, other in zip(found[1] + found[2], wanted[1] + wanted[2], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt2"])
def test_recomputation_gives_the_same_bits(model: str, dtype: str) -> None:
    flags = f"{toys.MODELS[model]} --layers 3 --micro-batch 2 --dtype {dtype}"
    wanted = alone(flags)
    for kind in KINDS:
        assert_same_bits(alone(f"{flags} --recompute {kind}"), wanted)


@pytest.mark.parametrize("layout", ["--tp 2 --sequence-parallel --micro-batch 2",
                                    pytest.param("--tp 2 --micro-batch 2", marks=pytest.mark.slow),
                                    pytest.param("--pp 2", marks=pytest.mark.slow)])
def test_recomputation_gives_the_same_bits_in_a_layout(ranks: Any, layout: str) -> None:
    flags = f"{toys.MODELS['qwen3']} --dtype bf16 {layout}"
    wanted = ranks(2, run, flags=flags)
    for kind in KINDS:
        for found, kept in zip(ranks(2, run, flags=f"{flags} --recompute {kind}"), wanted, strict=True):
            assert_same_bits(found, kept)


@contextmanager
def counted(room: Any, name: str) -> Iterator[list[int]]:
    """Counts the calls of a function of a module."""
    calls, function = [0], getattr(room, name)

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return function(*args, **options)

    setattr(room, name, call)
    try:
        yield calls
    finally:
        setattr(room, name, function)


@pytest.mark.parametrize(("kind", "norms", "activations"), [
    ("none", 2 * 3 + 1, 3), ("selective", 4 * 3 + 1, 6), ("full:1", 2 * 2 + 4 * 2 + 1, 6), ("full", 4 * 3 + 1, 6)])
def test_what_is_made_again_and_how_often(kind: str, norms: int, activations: int) -> None:
    """Of three layers and one micro-batch: what a mistake would keep, or make more often than needed."""
    with counted(parts, "add_rms_norm") as added, counted(parts, "rms_norm") as alone_norms, (
            counted(mlp, "swiglu")) as swiglus:
        flags = f"{toys.MODELS['llama']} --layers 3 --micro-batch 4 --recompute {kind}"
        config = toys.make_config(flags)
        engine = Engine(config, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), torch.device("cpu"), torch.float64)
        engine.initialize()
        toys.train(engine, 1)
    assert (added[0] + alone_norms[0], swiglus[0]) == (norms, activations)
