"""Bias, dropout and residual, forward and backward (whose gradient of the residual is the one that came)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cases.activation import normal, peer
from cases.base import FEW, TOKENS, Case, Run
from engine.kernels.dropout import bias_dropout_add_launch, bias_dropout_backward_launch

SEED = 1 << 40
"""As a hash would be, beyond 32 bits."""


def case(tokens: int, width: int, p: float, model: str, backward: bool) -> Case:
    def build(device: torch.device) -> Run:
        x, residual, bias = (normal(device, *shape) for shape in ((tokens, width), (tokens, width), (width,)))
        if backward:
            return lambda: bias_dropout_backward_launch(x, p, SEED, 0, True)
        return lambda: bias_dropout_add_launch(x, bias, residual, p, SEED, 0)

    def formula(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + F.dropout(x + bias, p)

    shapes: list[tuple[int, ...]] = [(tokens, width), (width,), (tokens, width)]
    return Case(
        kernel=f"bias+dropout+residual {'backward' if backward else 'forward'}",
        shape=f"{tokens} x {width}, p {p} ({model})", dtype="bf16", build=build,
        bytes=(2 if backward else 3) * tokens * width * 2, target=0.85,
        peers={"torch eager": peer(formula, shapes, backward, compiled=False),
               "torch.compile": peer(formula, shapes, backward, compiled=True)})


CASES, TINY = ([case(tokens, 4096, 0.1, "7B", backward=False), case(tokens, 4096, 0.0, "7B", backward=False),
                case(tokens, 4096, 0.1, "7B", backward=True), case(tokens, 8192, 0.1, "70B", backward=False)]
               for tokens in (TOKENS, FEW))
