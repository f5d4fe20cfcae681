"""Every kernel, compiled for GPUs that are not here, keeps within their limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.rule import needs_triton

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_triton


@pytest.mark.parametrize("arch", [90, 80])
def test_shared_memory_spills_and_hgmma_at_real_shapes(arch: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "benchmarks/resources.py", "--arch", str(arch)], cwd=ROOT, env=env,
                           capture_output=True, text=True)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1].endswith(" kernels, 0 outside their limits")
