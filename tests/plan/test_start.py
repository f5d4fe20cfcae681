"""Planning comes before every start, so it must not drag torch's compiler in, and must leave torch as it found it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAN = """
import sys, torch, torch._decomp
from engine.config import Layout, parse
from engine.plan import estimate
from engine.plan.trace import HIDDEN, _layers
flags = "--model {model} --seq-len 64 --recompute --dtype bf16 --tp 2 --sequence-parallel"
estimate(parse(flags.split()), Layout(tp=2), torch.bfloat16)
assert "torch._dynamo" not in sys.modules, "the plan imported torch's compiler"
tables = torch._decomp.global_decomposition_table.values()
marked = [layer for table in tables for function in table.values() for layer in _layers(function)
          if hasattr(layer, HIDDEN)]
assert not marked, f"left behind on {marked[:3]}"
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "gpt2"])
def test_a_plan_imports_no_compiler_and_leaves_no_mark_on_torch(model: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLAN.replace("{model}", model)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
