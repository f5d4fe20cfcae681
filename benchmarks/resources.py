"""Compiles every kernel at real 7B and 70B shapes for GPUs that are not here, and prints what each one uses.

    python benchmarks/resources.py [--arch 90 80] [--only norm attention] [--shape 'x 256'] [--save]

Triton is given a driver that knows an architecture and nothing else; the launchers run on meta tensors, and each launch
only compiles. Registers, shared memory and spills are read from the machine code by the cuobjdump that Triton carries.
Exits 1 if a kernel needs more shared memory than a block may have, spills, or (sm_90) multiplies without HGMMA or with
products that wait for each other: the assembler may put a wait after each one, and says so only in a remark.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from cases import all_cases
from common import keep, table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.kernels.language import HOPPER, shared_memory

ARCHITECTURES = (80, 86, 89, 90, 120)
"""Those it can be asked for: both amounts of shared memory among GPUs without Hopper's instructions, and Hopper."""
META = torch.device("meta")
SPILL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Use:
    """What one compiled kernel uses. `blocks` fit on a multiprocessor at once, by registers, memory and threads."""

    case: str
    shape: str
    dtype: str
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    shared: int
    spills: int
    hgmma: int
    waits: int
    blocks: int
    wrong: str


class _Target:
    """A driver that can only say what it compiles for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a number of its own, so that each architecture has its own cache of kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return META


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Within it launches compile for `arch` and run nothing; gives the (name, compiled kernel) pairs as they come.

    The driver stays: without a GPU there is none to go back to.
    """
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = warm_up
    driver.set_active(_Target(arch))
    try:
        yield found
    finally:
        JITFunction.run = run


def tool(name: str) -> str:
    """A binary of the CUDA toolkit that Triton carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect(kernel: Any, folder: Path) -> tuple[int, int, int, int]:
    """Registers a thread, local-memory instructions (spills), HGMMA instructions and their waits in a kernel's code.

    Disassembling takes as long as compiling: code without a stack has no local memory to reach, and without wgmma in
    its PTX none of the other two.
    """
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    registers, stack = map(int, found.groups())
    if stack == 0 and "wgmma" not in kernel.asm["ptx"]:
        return registers, 0, 0, 0
    sass = subprocess.run([tool("cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    waits = sass.count("WARPGROUP.DEPBAR") + sass.count("WARPGROUP.ARRIVE")
    return registers, len(SPILL.findall(sass)), sass.count("HGMMA"), waits


def blocks(arch: int, warps: int, registers: int, shared: int) -> int:
    """Blocks on a multiprocessor: 64 or 48 warps, 65,536 registers by 256 a warp, shared memory with 1 KB a block."""
    most = 64 if arch in (80, 90) else 48  # warps
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = (shared_memory(arch) + 1024) // (shared + 1024)
    return min(most // warps, by_registers, by_shared, 32)


def measure(arch: int, only: list[str], shape: str) -> Iterator[Use]:
    """Compiles the cases of `only` (files; none is all) whose shape says `shape`; tells each kernel of a case once."""
    read: dict[str, tuple[int, int, int, int]] = {}  # shapes share kernels, and reading takes long
    with tempfile.TemporaryDirectory() as name, compiling(arch) as found:
        for case in all_cases(only):
            if shape not in case.shape:
                continue
            run = case.build(META)
            assert run is not None, case.kernel
            found.clear()  # what building the inputs launched is another case's
            run()
            assert found, f"{case.kernel}: nothing was launched"
            for kernel_name, kernel in {id(kernel): (n, kernel) for n, kernel in found}.values():
                if kernel.hash not in read:
                    read[kernel.hash] = inspect(kernel, Path(name))
                registers, spills, hgmma, waits = read[kernel.hash]
                meta = kernel.metadata
                wrong = [text for bad, text in (
                    (meta.shared > shared_memory(arch), f"shared memory over {shared_memory(arch)}"),
                    (spills > 0, "spills"),
                    (case.matmul and arch == HOPPER and "dot" in kernel.asm["ttir"] and not hgmma, "no HGMMA"),
                    (0 < hgmma <= waits, "products wait for each other")) if bad]
                yield Use(case.kernel, case.shape, case.dtype, kernel_name, arch, meta.num_warps, meta.num_stages,
                          registers, meta.shared, spills, hgmma, waits,
                          blocks(arch, meta.num_warps, registers, meta.shared), ", ".join(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[], help="files of benchmarks/cases/")
    parser.add_argument("--shape", default="", help="cases whose shape has this in it: 'x 256'")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/resources.json")
    options = parser.parse_args()
    uses = [use for arch in options.arch for use in measure(arch, options.only, options.shape)]
    head = ("case", "shape", "dtype", "kernel", "sm", "warps", "stages", "registers", "shared", "spills", "HGMMA",
            "waits", "blocks/SM", "wrong")
    print(table([head, *(tuple(str(value) for value in asdict(use).values()) for use in uses)]))
    if options.save:
        print(keep("resources", {"triton": triton.__version__, "kernels": [asdict(use) for use in uses]}))
    wrong = [use for use in uses if use.wrong]
    print(f"{len(uses)} kernels, {len(wrong)} outside their limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
