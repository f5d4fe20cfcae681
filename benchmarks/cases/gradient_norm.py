"""The sum of squares of a rank's gradients: one flat buffer, and the 291 tensors of a 7B model's 1/8 shard."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cases.base import Build, Case, Run
from engine.kernels.gradient_norm import launch, sum_of_squares

FLAT = [1 << 28]
SHARD = [32000 * 512, *([512] * 2 + [4096 * 512] * 4 + [11008 * 512] * 3) * 32, 512, 32000 * 512]
"""Embedding, 32 layers of two norms, four projections and three of the MLP, last norm, head; 1/8 of each."""


def views(lengths: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Gradients of these lengths side by side in one fp32 buffer."""
    return list(torch.empty(sum(lengths), device=device).normal_().split(list(lengths)))


def ours(lengths: Sequence[int]) -> Build:
    def build(device: torch.device) -> Run:
        tensors = views(lengths, device)
        return lambda: launch(tensors)

    return build


def torch_eager(lengths: Sequence[int]) -> Build:
    """What the engine does by torch: one norm after the other."""
    def build(device: torch.device) -> Run:
        tensors = views(lengths, device)
        return lambda: sum_of_squares(tensors)

    return build


def torch_foreach(lengths: Sequence[int]) -> Build:
    def build(device: torch.device) -> Run:
        tensors = views(lengths, device)
        return lambda: torch.stack(torch._foreach_norm(tensors)).double().square().sum()

    return build


def case(shape: str, lengths: Sequence[int]) -> Case:
    return Case(kernel="gradient norm", shape=shape, dtype="fp32", build=ours(lengths), bytes=4 * sum(lengths),
                target=0.85, peers={"torch foreach": torch_foreach(lengths), "torch eager": torch_eager(lengths)})


CASES = [case(f"{FLAT[0]:,} in one tensor", FLAT), case(f"{sum(SHARD):,} in {len(SHARD)} tensors", SHARD)]
TINY = [case("20,005 in one tensor", [20_005]), case("10,082 in 3 tensors", [5, 10_000, 77])]
