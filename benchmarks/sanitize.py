"""Runs every kernel once under NVIDIA's compute-sanitizer: memcheck for accesses outside of tensors, racecheck for
hazards in shared memory. Its cases are the benchmark's kernels on few rows: under the tool a kernel is 10 to 100 times
slower.

    python benchmarks/sanitize.py [--only norm] [--tool memcheck racecheck] [--limit 270]

Without a GPU or the tool, or where the tool cannot watch processes, it says so in a line and exits 0. Exits 1 where the
tool found something or a case failed. A tool that is not done within its limit is ended, and what it did not come to is
said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

TOOLS = ("memcheck", "racecheck")
FOUND = 86
"""Exit code that the tool is told to give where it found something."""
TRIAL = "import torch; torch.ones(1, device='cuda').add_(1); torch.cuda.synchronize()"


def sanitizer() -> str | None:
    """compute-sanitizer, on the path or in a CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def under(tool: str, command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Exit code (None: ended at the limit) and output of a Python command line under the tool."""
    binary = sanitizer()
    assert binary is not None
    # Without its cache every tensor is an allocation of its own, at whose end memcheck stands.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    try:
        done = subprocess.run([binary, *options, sys.executable, *command], env=env, timeout=limit,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except subprocess.TimeoutExpired as late:
        text = late.stdout or b""
        return None, text.decode(errors="replace") if isinstance(text, bytes) else text
    return done.returncode, done.stdout


def run_cases(only: Sequence[str], device: torch.device) -> None:
    """What the tool watches: every tiny case once."""
    from cases import all_cases

    for case in all_cases(only, tiny=True):
        print(f"case {case.kernel}, {case.shape}, {case.dtype}", flush=True)
        run = case.build(device)
        assert run is not None
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    print("all cases", flush=True)


def verdict(tool: str, code: int | None, output: str, limit: float) -> tuple[str, bool]:
    """A tool's result in words, and whether something is wrong."""
    begun = [line.removeprefix("case ") for line in output.splitlines() if line.startswith("case ")]
    last = begun[-1] if begun else "the first case"
    if code is None:
        return f"{tool}: nothing found in {max(0, len(begun) - 1)} cases, ended after {limit:.0f} s in {last}", False
    if code == 0:
        return f"{tool}: nothing found in {len(begun)} cases", False
    found = "found something" if code == FOUND else f"exit code {code}"
    return f"{output}\n{tool}: {found}, the last case begun was {last}", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="files of benchmarks/cases/")
    parser.add_argument("--tool", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--limit", type=float, default=270.0, help="seconds for each tool")
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watched:
        import common  # noqa: F401 - puts the source tree on the path

        run_cases(options.only, torch.device("cuda"))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/sanitize.py: torch sees no CUDA GPU here, nothing was run")
        return 0
    if sanitizer() is None:
        print("benchmarks/sanitize.py: compute-sanitizer is not here (it comes with the CUDA toolkit), nothing was run")
        return 0
    code, output = under("memcheck", ["-c", TRIAL], 120)
    if code != 0:
        reason = (output.strip().splitlines() or ["no output"])[-1]
        print(f"benchmarks/sanitize.py: compute-sanitizer does not work here, nothing was run: {reason}")
        return 0
    wrong = False
    for tool in options.tool:
        command = [str(Path(__file__).resolve()), "--watched", *(["--only", *options.only] if options.only else [])]
        text, bad = verdict(tool, *under(tool, command, options.limit), options.limit)
        print(text, flush=True)
        wrong = wrong or bad
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
