"""A checkpoint, optimizer included, goes on under any other layout as if nothing had happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import toys

from engine import verify
from engine.checkpoint import open_checkpoint, save_checkpoint
from engine.config import to_dict
from engine.train.run import restore

SAVED, STEPS = 4, 7
SOURCE = (4, "--tp 2 --pp 2")
TARGETS = {"dp4": (4, ""), "tp4": (4, "--tp 4"), "pp4": (4, "--pp 4"), "one process": (1, "")}
State = dict[str, np.ndarray]


def state(engine: Any) -> State:
    """On every rank: the whole of each tensor that a checkpoint holds, put together over the mesh."""
    whole: State = {}
    for kind in ("model", "master", "exp_avg", "exp_avg_sq"):
        entries = [entry for entry in engine.optimizer.entries() if entry.kind == kind]
        if kind != "master" or engine.config.runtime.dtype == "bf16":
            found = verify.gather(entries, engine.config, engine.mesh, "world")
            whole |= {f"{kind}/{name}": tensor.numpy() for name, tensor in found.items()}
    return whole


def save_and_go_on(rank: int, world: int, flags: str, root: Path, steps: int) -> Any:
    """On a rank: trains, saves on the way, and trains on; returns the later curve and the state that was saved."""
    engine = toys.make_engine(toys.make_config(flags), rank, world)
    toys.train(engine, SAVED)
    meta = {"samples": 0, "config": to_dict(engine.config), "world": {}, "optimizer_steps": engine.optimizer.steps}
    save_checkpoint(root, engine.step, engine.optimizer.entries(), rank=rank, world=world, agree=engine.agree,
                    meta=meta, assets={})
    saved = state(engine)
    return toys.train(engine, steps - SAVED), saved if rank == 0 else None


def load_and_go_on(rank: int, world: int, flags: str, root: Path, steps: int) -> Any:
    """On a rank: the curve from the checkpoint on, and the state as it was loaded. The weights it loads over are of
    another seed."""
    engine = toys.make_engine(toys.make_config(f"{flags} --seed 99"), rank, world)
    restore(engine, open_checkpoint(root / f"step-{SAVED:08d}"))
    engine.optimizer.gather()
    engine.config = toys.make_config(flags)  # the seed of the batches
    loaded = state(engine)
    return toys.train(engine, steps - SAVED), loaded if rank == 0 else None


def differing(found: State, wanted: State) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert found.keys() == wanted.keys()
    return [name for name, tensor in wanted.items() if not np.array_equal(found[name], tensor)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "targets"), [("llama-tied", [*TARGETS]), ("gpt2", ["tp4", "pp4"]),
                                                ("llama", ["dp4", "one process"])])
def test_the_curve_goes_on_under_any_layout(ranks: Any, model: str, targets: list[str], tmp_path: Path) -> None:
    world, flags = SOURCE
    line = toys.MODELS[model]
    curve, saved = ranks(world, save_and_go_on, flags=f"{line} {flags}", root=tmp_path, steps=STEPS)[0]
    for target, (count, layout) in ((target, TARGETS[target]) for target in targets):
        went_on, loaded = ranks(count, load_and_go_on, flags=f"{line} {layout}", root=tmp_path, steps=STEPS)[0]
        assert not differing(loaded, saved), target
        np.testing.assert_allclose(went_on, curve, rtol=1e-10, atol=0, err_msg=target)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_layout_goes_on_bit_for_bit(ranks: Any, dtype: str, tmp_path: Path) -> None:
    world, flags = SOURCE
    line = f"{toys.MODELS['llama-tied']} --dtype {dtype} {flags}"
    curve, saved = ranks(world, save_and_go_on, flags=line, root=tmp_path, steps=STEPS)[0]
    went_on, loaded = ranks(world, load_and_go_on, flags=line, root=tmp_path, steps=STEPS)[0]
    assert not differing(loaded, saved)
    assert went_on == curve


def test_master_weights_move_to_another_layout_bit_for_bit(ranks: Any, tmp_path: Path) -> None:
    world, flags = SOURCE
    line = f"{toys.MODELS['llama']} --dtype bf16"
    _, saved = ranks(world, save_and_go_on, flags=f"{line} {flags}", root=tmp_path, steps=SAVED)[0]
    assert any(name.startswith("master/") for name in saved)
    for target, (count, layout) in ((target, TARGETS[target]) for target in ("dp4", "tp4")):
        _, loaded = ranks(count, load_and_go_on, flags=f"{line} {layout}", root=tmp_path, steps=SAVED)[0]
        assert not differing(loaded, saved), target
        rounded = {name: torch.from_numpy(loaded[f"master/{name}"]).bfloat16().float().numpy()
                   for name in (full.partition("/")[2] for full in loaded if full.startswith("master/"))}
        assert not differing({f"model/{name}": x for name, x in rounded.items()},
                             {full: x for full, x in loaded.items() if full.startswith("model/")}), target
