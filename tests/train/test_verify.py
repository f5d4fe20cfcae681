"""engine.verify says `equal` where layouts are, and finds what is wrong where they are not."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import verify
from engine.config import Layout, RunConfig, check, parse
from engine.mesh import AXES, Mesh, build_mesh
from engine.parallel import optimizer
from engine.parallel.sharding import shard_of

FLAGS = ("--layers 2 --hidden 16 --ffn-hidden 32 --heads 2 --kv-heads 2 --vocab-size 11 --seq-len 8 --steps 3 "
         "--dtype fp64")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return parse(FLAGS.split())


@pytest.fixture(scope="module")
def run(config: RunConfig) -> verify.Trace:
    return verify.trace(config, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), torch.device("cpu"), torch.float64)


def changed(run: verify.Trace, field: str) -> verify.Trace:
    """The run with one small error in one place."""
    if field in ("loss", "norm"):
        loss, norm = run.curve[2]
        wrong = (loss * (1 + 1e-9), norm) if field == "loss" else (loss, norm * (1 + 1e-9))
        return replace(run, curve=[*run.curve[:2], wrong])
    if field == "samples":
        moved = run.samples.clone()
        moved[2, 1] += 1
        return replace(run, samples=moved)
    name = "model.norm.weight"
    tensors = getattr(run, field)
    if field == "weights":
        moved = tensors[name].clone()
        moved[3] = torch.nextafter(moved[3], moved[3] + 1)
    else:
        moved = tensors[name] * (1 + 1e-9)
    return replace(run, **{field: {**tensors, name: moved}})


def test_a_run_equals_itself(run: verify.Trace, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.report(run, run, config, "dp1")
    assert capsys.readouterr().out.splitlines()[-1] == "equal"


@pytest.mark.parametrize(("field", "where"), [("weights", "model.norm.weight"), ("gradients", "model.norm.weight"),
                                              ("loss", "step 3"), ("norm", "step 3"),
                                              ("samples", "step 3, sample 2")])
def test_the_smallest_difference_is_found_and_named(run: verify.Trace, config: RunConfig, field: str, where: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert not verify.report(changed(run, field), run, config, "dp1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "differs" and sum(line.endswith(where) for line in lines) == 1


def test_not_a_number_is_never_equal(run: verify.Trace, config: RunConfig) -> None:
    for part in ("weights", "gradients"):
        tensors: dict[str, Any] = getattr(run, part)
        spoilt = {**tensors, "lm_head.weight": tensors["lm_head.weight"].clone().fill_(float("nan"))}
        assert not verify.report(replace(run, **{part: spoilt}), run, config, "dp1"), part
    assert not verify.report(replace(run, curve=[*run.curve[:2], (float("nan"), 1.0)]), run, config, "dp1")


def planted(rank: int, world: int, flags: str, fault: str, victim: int) -> tuple[str, list[str]]:
    """On a rank: what the report says of a layout in which one rank, `victim`, has a small fault, and where it is."""
    import contextlib
    import io

    config = parse(f"{FLAGS} --global-batch 4 {flags}".split())
    layout = check(config, world)
    mesh = build_mesh(layout, rank, config.model.kv_heads, timedelta(seconds=60))
    where: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if rank == victim:
            plant(patch, fault, where)
        found = verify.trace(config, mesh, torch.device("cpu"), torch.float64)
    said = io.StringIO()
    if rank == 0:
        wanted = verify.trace(verify.alone(config), Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), torch.device("cpu"),
                              torch.float64)
        with contextlib.redirect_stdout(said):
            verify.report(found, wanted, config, str(layout))
    return said.getvalue(), where


def plant(patch: pytest.MonkeyPatch, fault: str, where: list[str]) -> None:
    """Makes this rank's engine wrong in one place, whose name it adds to `where`."""
    def initialize(self: Any) -> None:
        sound_initialize(self)
        norm = next(p for model in self.models() for p in model.parameters()
                    if shard_of(p).members[0].name.endswith("input_layernorm.weight"))
        norm.data[3] += 1e-15
        where.append(f"{shard_of(norm).members[0].name} of dp copy 1")

    def sum_partial(self: Any) -> None:
        sound_sum(self)
        if not where:
            piece, span = next(self.buckets[0].shard_pieces())
            self.buckets[0].shard_grads[span] *= 1 + 1e-8
            where.append(piece.member.name)

    def batch(config: RunConfig, step: int, dp_rank: int, dp: int) -> Any:
        made = sound_batch(config, step, dp_rank, dp)
        if step == 1:
            made.tokens[-1, 2] = (made.tokens[-1, 2] + 1) % config.model.vocab_size
            where.append(f"step 2, sample {(dp_rank + 1) * config.batch.global_batch // dp}")
        return made

    sound_initialize, sound_batch = verify.Engine.initialize, verify.make_batch
    sound_sum = optimizer.ShardedAdamW._sum_partial
    if fault == "weight":
        patch.setattr(verify.Engine, "initialize", initialize)
    elif fault == "gradient":
        patch.setattr(optimizer.ShardedAdamW, "_sum_partial", sum_partial)
    elif fault == "sample":
        patch.setattr(verify, "make_batch", batch)


LAYOUTS = {"dp2": (2, ""), "tp2-dp2-sp": (4, "--tp 2 --sequence-parallel"), "pp2-dp2": (4, "--pp 2"),
           "tp2-dp2-gpt2": (4, "--tp 2 --family gpt2 --qkv-bias --out-bias --mlp-bias --tied")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_with_copies_of_the_model_is_equal(ranks: Any, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    said, _ = ranks(world, planted, flags=flags, fault="", victim=-1)[0]
    assert said.splitlines()[-1] == "equal", said


VICTIMS = [("dp2", 1), ("tp2-dp2-sp", 2), ("tp2-dp2-sp", 3), ("pp2-dp2", 1), ("pp2-dp2", 3)]
"""Ranks of dp copy 1, the last ones of a tp pair and of the stages among them."""


@pytest.mark.parametrize(("layout", "victim"), VICTIMS)
@pytest.mark.parametrize("fault", ["weight", "gradient", "sample"])
def test_a_fault_in_the_second_copy_alone_is_found_and_named(ranks: Any, layout: str, victim: int, fault: str) -> None:
    world, flags = LAYOUTS[layout]
    results = ranks(world, planted, flags=flags, fault=fault, victim=victim)
    said, [where] = results[0][0], results[victim][1]
    row = {"weight": "dp copies", "gradient": "first gradient", "sample": "samples"}[fault]
    lines = said.splitlines()
    assert lines[-1] == "differs" and any(line.startswith(row) and line.endswith(where) for line in lines), said


PROGRAM = '''
"""engine.verify, with a fault in the weights of one rank."""
import os, sys
from engine import verify
from engine.train.engine import Engine

def initialize(self, sound=Engine.initialize):
    sound(self)
    if self.mesh.rank == 3:
        list(self.models())[-1].norm.weight.data[0] += 1e-15

Engine.initialize = initialize
sys.exit(verify.main(sys.argv[1:]))
'''


def verified(folder: Path, *command: str) -> tuple[list[int | None], list[str]]:
    """The exit codes of four ranks that verify, and the lines they printed."""
    run = runs.start_program(folder / "verify", [*command, "--layers", "2"])
    try:
        return run.codes(), run.said().splitlines()
    finally:
        run.kill()


@pytest.mark.slow
def test_the_command_fails_on_a_fault_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(PROGRAM)
    codes, lines = verified(tmp_path, str(tmp_path / "faulty.py"), "--tp", "2", "--steps", "2")
    assert codes == [1] * 4 and lines[-1] == "differs", lines
    assert any("model.norm.weight of dp copy 1" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--tp 2 --sequence-parallel --pp 2", "--tp 2 --sequence-parallel --dtype fp32"])
def test_the_command_compares_a_layout_with_one_process(flags: str, tmp_path: Path) -> None:
    codes, lines = verified(tmp_path, "-m", "engine.verify", *flags.split(), "--steps", "6")
    assert codes == [0] * 4 and lines[-1] == "equal", lines
    assert [path.suffix for path in tmp_path.iterdir()] == [".log"], "it writes nothing"
