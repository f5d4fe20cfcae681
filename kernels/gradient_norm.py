"""The sum of squares of many tensors, which the global gradient norm is the root of.

One launch reads them all: the host lays them out as runs (address, elements), one to a program. Squares are summed in
float64, where the square of no fp32 number overflows or vanishes: the result is infinite or NaN where an element is,
and only there. Partial sums, one a run, are added in a fixed order: the same tensors give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from engine.kernels.language import jit, tl

RUN = 8192
NUM_WARPS = 8
"""A thread loads 32 elements, in 8 accesses of 16 bytes, and its 48 registers leave room for 5 such blocks on a
multiprocessor: 160 KB are under way. An A100, H100 or H200 widens 16 fp32 numbers to float64 a clock and
multiprocessor, and memory brings 3 to 5: squares in float64 cost no time there."""


def sum_of_squares(tensors: Sequence[torch.Tensor], *, by: str = "torch") -> torch.Tensor:
    """The sum of squares of all elements, a float64 scalar on the tensors' device (the CPU where there are none).

    By "torch" each tensor's norm is taken in its own dtype: infinite from about 1.8e19 on in fp32. By "triton" in
    float64 throughout; tensors are fp32, bf16 or fp16.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if by == "triton":
        return _sum_of_squares(list(tensors))
    return torch.stack([tensor.norm().double().square() for tensor in tensors]).sum()


@jit
def squares_kernel(runs, partials, ELEMENT: tl.constexpr, BLOCK_N: tl.constexpr):
    """partials[program] = sum of squares of the run at runs[program, 0], of runs[program, 1] elements."""
    program = tl.program_id(0)
    count = tl.load(runs + 2 * program + 1)
    run = tl.load(runs + 2 * program).to(tl.pointer_type(ELEMENT))
    offs = tl.arange(0, BLOCK_N)
    # A whole run begins at a multiple of 16 bytes and goes unmasked: a mask by a count of unknown divisors would cut
    # its accesses to single elements.
    if count == BLOCK_N:
        x = tl.load(tl.multiple_of(run, 16) + offs).to(tl.float64)
        tl.store(partials + program, tl.sum(x * x))
    else:
        x = tl.load(run + offs, mask=offs < count, other=0.0).to(tl.float64)
        tl.store(partials + program, tl.sum(x * x))


def launch(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The float64 sum, by one launch for each dtype among the tensors. A tensor that is not contiguous is copied."""
    device = tensors[0].device
    flat = [tensor.contiguous() for tensor in tensors]
    partials = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in flat):
        spans = tuple((tensor.data_ptr(), tensor.numel()) for tensor in flat if tensor.dtype == dtype)
        runs = _runs(spans, dtype.itemsize, device)
        if len(runs):
            partials.append(torch.empty(len(runs), dtype=torch.float64, device=device))
            element = getattr(tl, str(dtype).removeprefix("torch."))
            squares_kernel[(len(runs),)](runs, partials[-1], ELEMENT=element, BLOCK_N=RUN, num_warps=NUM_WARPS)
    if not partials:
        return torch.zeros((), dtype=torch.float64, device=device)
    return (partials[0] if len(partials) == 1 else torch.cat(partials)).sum()


@lru_cache(maxsize=8)
def _runs(spans: tuple[tuple[int, int], ...], itemsize: int, device: torch.device) -> torch.Tensor:
    """(address, elements) of every run of tensors given by address and length, [runs, 2] on the device.

    A run of `RUN` elements begins at a multiple of 16 bytes; a tensor that does not has a short first run up to there.
    Gradients lie at the same addresses every step, so the table of a model is made and copied once.
    """
    tables = [torch.empty(0, 2, dtype=torch.int64)]
    for address, length in spans:
        head = min(length, -address % 16 // itemsize)
        first = torch.cat([torch.arange(0, head, RUN), torch.arange(head, length, RUN)])
        tables.append(torch.stack([address + itemsize * first, first.diff(append=torch.tensor([length]))], 1))
    return torch.cat(tables).to(device)


@torch.library.custom_op("triax::sum_of_squares", mutates_args=())
def _sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return launch(tensors)


@_sum_of_squares.register_fake
def _(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)
