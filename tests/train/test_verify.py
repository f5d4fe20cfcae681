"""engine.verify says `equal` where layouts are, and finds what is wrong where they are not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import verify
from engine.config import Layout, RunConfig, parse
from engine.mesh import AXES, Mesh

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
                                              ("loss", "step 3"), ("norm", "step 3")])
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


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--tp 2 --sequence-parallel --pp 2", "--tp 4 --dtype fp32"])
def test_the_command_compares_a_layout_with_one_process(flags: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m",
               "engine.verify", *flags.split(), "--layers", "2", "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=runs.environment(), cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal" and not list(tmp_path.iterdir())
