"""`--recompute auto`: what is told, checked and run is one decision, and all ranks take the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import pretrain
from engine.checkpoint import open_checkpoint
from engine.checkpoint.stored_config import stored_config
from engine.config import to_dict
from engine.config.recompute import Recompute
from engine.errors import UserError
from engine.kernels.dispatch import Kernels
from engine.mesh import Mesh
from engine.model.decoder import Block
from engine.plan import Capacity, estimate, with_recompute
from engine.train import job as jobs
from engine.train.job import Job, prepare
from engine.train.place import Place
from engine.train.request import EntryPoint, read_request
from engine.train.settle import settled
from tests.parallel import toys

FLAGS = ("--layers 4 --hidden 32 --ffn-hidden 96 --heads 4 --vocab-size 128 --seq-len 64 --micro-batch 2 "
         "--global-batch 2 --steps 2 --dtype fp32 --device cpu").split()


def holds(monkeypatch: pytest.MonkeyPatch, recompute: Recompute) -> None:
    """Lets this machine have just the memory that a run of FLAGS needs with so much recomputation."""
    plan = estimate(with_recompute(toys.make_config(" ".join(FLAGS)), recompute), jobs.Layout(), torch.float32)
    capacity = Capacity("this machine", plan.heaviest.memory.total)
    monkeypatch.setattr(jobs, "capacity_of", lambda device, local: capacity)


@pytest.mark.parametrize("wanted", ["none", pytest.param("selective", marks=pytest.mark.slow), "full:2"])
def test_a_dry_run_a_check_and_the_run_decide_alike(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: str) -> None:
    data = runs.write_corpus(tmp_path / "corpus")
    out = tmp_path / "run"
    flags = [*FLAGS, *data, "--out", str(out), "--recompute", "auto"]
    recompute = {"none": Recompute(), "selective": Recompute(selective=True), "full:2": Recompute(2, selective=True)}
    holds(monkeypatch, recompute[wanted])
    line = f"--recompute auto takes {wanted}: the fullest rank needs "
    for switch in (["--dry-run"], ["--check"]):
        assert pretrain.main([*flags, *switch]) == 0
        assert capsys.readouterr().out.count(line) == 1
    built: list[str] = []
    start = Block.__init__

    def spy(self: Block, layer: int, parts: Any, index: int = 0) -> None:
        if parts.device.type == "cpu":
            built.append(str(parts.recompute))
        start(self, layer, parts, index)

    monkeypatch.setattr(Block, "__init__", spy)
    assert pretrain.main(flags) == 0
    assert capsys.readouterr().out.count(line) == 1
    assert built == [wanted] * 4
    # What was asked for is what is stored: who resumes may have another machine.
    assert yaml.safe_load((out / "config.yaml").read_text())["runtime"]["recompute"] == "auto"
    assert open_checkpoint(out / "checkpoints" / "step-00000002").run_config().runtime.recompute == "auto"


def test_what_does_not_fit_with_everything_made_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "capacity_of", lambda device, local: Capacity("this machine", 1000))
    entry = EntryPoint("engine.pretrain", {}, pretrain.check_data)
    with pytest.raises(UserError, match="this machine has 1.00 KB"):
        prepare(read_request(entry, [*FLAGS, "--recompute", "auto"]), Place(0, 1, 0, 1))


def decide(rank: int, world: int, own: list[str]) -> tuple[str, list[str]]:
    """On a rank whose memory asks for `own[rank]`: what all take, and what is said of it."""
    config = toys.make_config(f"{toys.MODELS['llama']} --tp 2 --recompute auto")
    mesh: Mesh = toys.make_mesh(config, rank, world)
    layout = jobs.check(config, world)
    asked = jobs.replace(config, runtime=jobs.replace(config.runtime, recompute=own[rank]))
    job = Job(config, layout, torch.device("cpu"), torch.float64, None, estimate(asked, layout, torch.float64),
              Kernels())
    found = settled(job, mesh)
    return found.plan.config.runtime.recompute, list(found.notes)


@pytest.mark.parametrize(("own", "wanted"), [
    (["none", "selective"], "selective"), (["full:2", "none"], "full:2"), (["full", "full:4"], "full")])
def test_the_rank_with_the_least_memory_decides_for_all(ranks: Any, own: list[str], wanted: str) -> None:
    found = ranks(2, decide, own=own)
    assert [recompute for recompute, _ in found] == [wanted, wanted]
    for before, (_, notes) in zip(own, found, strict=True):
        assert len(notes) == (before != wanted)


@pytest.mark.parametrize(("old", "now"), [(True, "full"), (False, "none")])
def test_a_config_from_before_goes_on_loading(tmp_path: Path, old: bool, now: str) -> None:
    content = json.loads(json.dumps(to_dict(toys.make_config(" ".join(FLAGS)))))
    content["runtime"]["recompute"] = old
    assert stored_config(content, tmp_path, "").runtime.recompute == now
