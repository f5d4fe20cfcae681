"""What every kernel file stands on: Triton where it is installed, and the few facts a launcher asks of a device.

Without Triton (a CPU-only installation) the kernels are names nobody calls: the references beside them need torch
alone. Under TRITON_INTERPRET=1, set before these files are imported, kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

# From Triton 3.10 on a multiplication and an addition are no longer one instruction unless this says so, and until then
# its absence is warned of.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:

    class _Absent:
        """Stands for triton.language in annotations and decorators of kernels that cannot run here."""

        constexpr = int

        def __getattr__(self, name: str) -> Any:
            raise ModuleNotFoundError(f"triton is not installed: pip install 'triax[gpu]' ({name} was asked for)")

    triton = None
    tl = _Absent()

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """Leaves a kernel as it is."""
        return function


INTERPRETING = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are decorated to run in Triton's interpreter."""

INTERPRETED = tl.constexpr(INTERPRETING)
"""The same, for kernels."""

HOPPER = 90

SHARED_MEMORY = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448, 110: 232448}
"""Bytes of shared memory a block may ask for, by architecture; Triton's compiler does not check it."""


LOG2E = tl.constexpr(math.log2(math.e))
"""e^x = 2^(x LOG2E): powers of two are what the special unit computes."""
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""The maximum of nothing. A number, not -inf, of which differences are numbers or -inf, and powers 0."""


@jit
def dot(a, b, acc):
    """acc + a b, accumulated in fp32; fp32 operands are never cut to tf32.

    The interpreter holds bf16 as integers and multiplies those: there the operands are widened first, which changes
    nothing, for products of two bf16 or fp16 numbers are exact in fp32.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def rounded(x, dtype: tl.constexpr):
    """fp32 in a dtype, rounded to nearest even as torch does: every kernel stores through this.

    The interpreter cuts the lower bits of bf16 off, so they are rounded away first.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def exp(x):
    """e^x. As a power of two, its subnormal results 0, it is one instruction of the special unit and not four."""
    return tl.exp2(x * LOG2E)


def jit_counting(*counts: str) -> Callable[..., Any]:
    """`jit` for a kernel that must not be compiled anew because a batch has an odd number of tokens: `counts` names the
    arguments whose values say nothing to the compiler."""
    return jit if triton is None else triton.jit(do_not_specialize=list(counts))


def arch(device: torch.device) -> int:
    """The architecture a launcher chooses its configuration for: 90, 80, ...; 0 in the interpreter.

    A meta tensor has no device: it is compiled ahead of time for Triton's active target.
    """
    if device.type == "cuda":
        return _capability(device.index or 0)
    if device.type == "meta":
        return int(triton.runtime.driver.active.get_current_target().arch)
    return 0


def shared_memory(gpu: int) -> int:
    """Bytes of shared memory a block may ask for on an architecture (86, 90, ...)."""
    return SHARED_MEMORY.get(gpu, 101376)  # sm_86, 89, 120 and 121: the least of all from sm_80 on


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, which fixed grids are multiples of; 132 (Hopper) for meta tensors, 2 interpreted."""
    if device.type == "cuda":
        return _processors(device.index or 0)
    return 132 if device.type == "meta" else 2


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
