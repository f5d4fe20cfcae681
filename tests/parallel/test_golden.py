"""Loss curves with all their digits: a change that should not change numbers leaves them as they are.

On the processor and torch that wrote them they are bit-equal; elsewhere sums run in other orders, and they are near.
After a change that should change numbers: `python tests/parallel/test_golden.py`, and say why in the commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import toys

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 8
CASES = {f"{model}, {dtype}": f"{toys.MODELS[model]} --dtype {dtype}"
         for model in toys.MODELS for dtype in ("fp64", "fp32", "bf16")}
NEAR = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 2e-2}
"""How far, relative to the loss, another processor or torch may be away."""


def machine() -> str:
    """What the bits of a sum depend on: torch's version, the instructions it uses, and the processor's libraries."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {name}"


def run(rank: int, world: int, flags: str) -> list[tuple[str, str]]:
    """On a rank: loss and gradient norm of each step, as `float.hex` writes them."""
    curve = toys.train(toys.make_engine(toys.make_config(flags), rank, world), STEPS)
    return [(float(loss).hex(), float(norm).hex()) for loss, norm in curve]


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_the_one_that_was_written_down(ranks: Any, case: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = ranks(1, run, flags=CASES[case])[0]
    wanted = [tuple(step) for step in golden["curves"][case]]
    if golden["machine"] == machine():
        assert found == wanted
    digits = [[[float.fromhex(number) for number in step] for step in curve] for curve in (found, wanted)]
    np.testing.assert_allclose(digits[0], digits[1], rtol=NEAR[case.split()[-1]])


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the pool's ranks have
    curves = {case: run(0, 1, flags) for case, flags in CASES.items()}
    GOLDEN.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")
