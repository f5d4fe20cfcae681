"""Toy models and batches that every parallel test trains, in one process or many."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch

from engine.config import RunConfig, check, parse
from engine.data.batches import Batch
from engine.mesh import build_mesh
from engine.parallel.sharding import pieces, shard_of
from engine.train.engine import DTYPES, Engine

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


def make_engine(config: RunConfig, rank: int, world: int) -> Engine:
    """An initialised engine on this rank."""
    mesh = build_mesh(check(config, world), rank, config.model.kv_heads, timedelta(seconds=60))
    engine = Engine(config, mesh, torch.device("cpu"), DTYPES[config.runtime.dtype])
    engine.initialize()
    return engine


def make_batch(config: RunConfig, step: int, dp_rank: int, dp: int) -> Batch:
    """A dp rank's part of a step's random batch; a quarter of the labels are not supervised, unevenly over the rows."""
    rng = np.random.default_rng(step)
    rows = rng.integers(0, config.model.vocab_size, (config.batch.global_batch, config.batch.seq_len + 1))
    labels = rows[:, 1:].copy()
    labels[rng.random(labels.shape) < np.linspace(0, 0.5, len(rows))[:, None]] = -100
    share = slice(dp_rank * len(rows) // dp, (dp_rank + 1) * len(rows) // dp)
    return Batch(rows[share, :-1], labels[share])


def train(engine: Engine, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    found = []
    for _ in range(steps):
        batch = make_batch(engine.config, engine.step, engine.mesh.dp, engine.mesh.size("dp"))
        result = engine.train_step(batch)
        found.append((result.loss, result.grad_norm))
    return found


def local_gradients(engine: Engine) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """The first micro-steps' summed gradients held in this rank's optimizer shard: (name, whole shape, start, values)."""
    found = []
    for bucket in engine.optimizer.buckets:
        for piece, span in bucket.shard_pieces():
            values = bucket.shard_grads[span].view(piece.extent).numpy().copy()
            found.append((piece.member.name, piece.member.shape, piece.start, values))
    return found


def local_weights(engine: Engine) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """Every rectangle of every local parameter: (name, whole shape, start, values)."""
    found = []
    for model in engine.models():
        for parameter in model.parameters():
            for piece in pieces(shard_of(parameter), 0, parameter.shape[0]):
                values = parameter.detach()[slice(*piece.rows)].to(torch.float64).numpy().copy()
                found.append((piece.member.name, piece.member.shape, piece.start, values))
    return found


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
