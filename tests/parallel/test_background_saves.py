"""Saving beside training changes no number of the run, and writes what saving in its place would have written."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import open_checkpoint, save_checkpoint
from engine.checkpoint.background import BackgroundSave
from engine.checkpoint.save import SaveWork
from engine.config import to_dict
from engine.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
import toys


def run(rank: int, world: int, flags: str, root: str | None) -> Any:
    """On a rank: the losses of some steps; with a folder, the second and fourth are saved in both ways."""
    engine = toys.make_engine(toys.make_config(flags), rank, world)
    if root is None:
        return toys.train(engine, 6)
    meta = {"samples": 0, "config": to_dict(engine.config), "world": {}, "optimizer_steps": 0}
    told: list[str] = []
    saver = BackgroundSave(Path(root) / "beside" / "checkpoints", rank=rank, world=world, agree=engine.agree,
                           device=torch.device("cpu"), told=lambda saved: told.append(saved.folder.name))
    engine.rider = saver
    curve = []
    for step in range(1, 7):
        curve += toys.train(engine, 1)
        if step in (2, 4):
            save_checkpoint(Path(root) / "waited" / "checkpoints", step, engine.optimizer.entries(), rank=rank,
                            world=world, agree=engine.agree, meta=meta, assets={})
            saver.save(step, engine.optimizer.entries(), meta=meta, assets={})
    saver.finish()
    assert told == ["step-00000002", "step-00000004"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save-")]
    return curve


@pytest.mark.parametrize(("world", "flags"), [
    (1, ""), (2, "--tp 2 --sequence-parallel"), pytest.param(4, "--pp 2 --micro-batch 2", marks=pytest.mark.slow),
    pytest.param(8, "--tp 2 --pp 2", marks=pytest.mark.slow)])
def test_checkpoints_are_those_of_a_run_that_waits(ranks: Any, tmp_path: Path, world: int, flags: str) -> None:
    line = f"{toys.MODELS['llama-tied']} --dtype bf16 {flags}"
    curves = [ranks(world, run, flags=line, root=root) for root in (None, str(tmp_path))]
    assert curves[0] == curves[1]
    for step in (2, 4):
        beside, waited = (open_checkpoint(tmp_path / how / "checkpoints" / f"step-{step:08d}")
                          for how in ("beside", "waited"))
        assert beside.tensors == waited.tensors, "each slice's checksum"
        assert any(tensor.slices for tensor in beside.tensors.values())


def run_failing(rank: int, world: int, root: str) -> tuple[str, int]:
    """On a rank: what a step raises when the disk of the last rank has failed, and at which step."""
    engine = toys.make_engine(toys.make_config(f"{toys.MODELS['llama']} --pp 2"), rank, world)
    saver = BackgroundSave(Path(root) / "checkpoints", rank=rank, world=world, agree=engine.agree,
                           device=torch.device("cpu"))
    engine.rider = saver
    toys.train(engine, 1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == world - 1:
            patch.setattr(SaveWork, "write", fail)
        saver.save(1, engine.optimizer.entries(), meta={}, assets={})
        try:
            toys.train(engine, 20)
        except UserError as error:
            return str(error), engine.step
    return "", engine.step


def fail(work: SaveWork) -> None:
    raise OSError(5, "Input/output error", "the disk")


def test_a_rank_that_cannot_write_ends_all_ranks_at_one_step(ranks: Any, tmp_path: Path) -> None:
    found = ranks(4, run_failing, root=str(tmp_path))
    assert len({step for _, step in found}) == 1 and found[0][1] < 20
    assert all("Input/output error" in said for said, _ in found), found
    assert list((tmp_path / "checkpoints").iterdir()) == []
