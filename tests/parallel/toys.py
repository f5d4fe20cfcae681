"""Toy models and batches that every parallel test trains, in one process or many."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch

from engine import verify
from engine.config import RunConfig, check, parse
from engine.mesh import Mesh, build_mesh
from engine.parallel.sharding import Entry
from engine.train.engine import DTYPES, Engine
from engine.verify import make_batch, train

__all__ = ["MODELS", "assemble", "local_gradients", "local_weights", "make_batch", "make_config", "make_engine",
           "make_mesh", "train"]

SHAPE = ("--layers 5 --hidden 32 --ffn-hidden 64 --heads 4 --kv-heads 2 --vocab-size 101 --micro-batch 1 "
         "--global-batch 4 --seq-len 16 --steps 20 --lr 1e-2 --warmup 3 --dtype fp64")
MODELS = {
    "llama": SHAPE,
    "llama-tied": f"{SHAPE} --tied",
    "qwen3": f"{SHAPE} --qkv-bias --qk-norm",
    "gpt2": f"{SHAPE} --family gpt2 --qkv-bias --out-bias --mlp-bias --tied",
}


def make_config(flags: str) -> RunConfig:
    """The config of a line of flags."""
    return parse(flags.split())


def make_mesh(config: RunConfig, rank: int, world: int, *, shared: bool = True) -> Mesh:
    """This rank's mesh; `shared`: through shared memory, else through torch.distributed."""
    return build_mesh(check(config, world), rank, config.model.kv_heads, timedelta(seconds=60), shared=shared,
                      tied=config.model.tied, wraps=config.parallel.virtual_stages > 1)


def make_engine(config: RunConfig, rank: int, world: int, mesh: Mesh | None = None) -> Engine:
    """An initialised engine on this rank."""
    mesh = mesh or make_mesh(config, rank, world)
    engine = Engine(config, mesh, torch.device("cpu"), DTYPES[config.runtime.dtype])
    engine.initialize()
    return engine


def local_gradients(engine: Engine) -> list[Any]:
    """The last step's summed gradients in this rank's optimizer shard: (name, whole shape, start, values)."""
    return [_plain(entry) for entry in verify.local_gradients(engine)]


def local_weights(engine: Engine) -> list[Any]:
    """Every rectangle of every local parameter: (name, whole shape, start, values)."""
    return [_plain(entry) for entry in verify.local_weights(engine)]


def _plain(entry: Entry) -> tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]:
    """What a rank sends back to the test."""
    member = entry.piece.member
    return member.name, member.shape, entry.piece.start, entry.tensor.to(torch.float64).numpy().copy()


def assemble(parts: list[Any]) -> dict[str, np.ndarray]:
    """Whole tensors from the rectangles of all ranks; what is held more than once must agree to the last bit."""
    whole: dict[str, np.ndarray] = {}
    for name, shape, start, values in parts:
        full = whole.setdefault(name, np.full(shape, np.nan))
        where = tuple(slice(s, s + n) for s, n in zip(start, values.shape, strict=True))
        held = full[where]
        assert ((held == values) | np.isnan(held)).all(), f"copies of {name} differ"
        full[where] = values
    for name, full in whole.items():
        assert not np.isnan(full).any(), f"{name} is not covered"
    return whole
