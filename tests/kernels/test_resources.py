"""Every kernel, compiled for GPUs that are not here, keeps within their limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.rule import needs_triton

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_triton


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """A process for each architecture, at the same time: all kernels for two; for one with less shared memory than
    either, what needs most of it, attention over heads of 256."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = {arch: subprocess.Popen([sys.executable, "benchmarks/resources.py", "--arch", str(arch), *only], cwd=ROOT,
                                      env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for arch, only in ((90, ()), (80, ()), (89, ("--only", "attention", "--shape", "x 256")))}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80, 89])
def test_shared_memory_spills_and_hgmma_at_real_shapes(compilers: dict[int, subprocess.Popen[str]], arch: int) -> None:
    said, _ = compilers[arch].communicate()
    print(said)
    assert compilers[arch].returncode == 0
    assert said.splitlines()[-1].endswith(" kernels, 0 outside their limits")
