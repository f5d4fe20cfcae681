"""The feed-forward part of a block: SwiGLU (Llama) or GELU (GPT-2), its width split over the tensor axis."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from engine.kernels.activation import bias_gelu, swiglu
from engine.model.parts import Parts
from engine.parallel.layers import ColumnParallelLinear, Remade, RowParallelLinear
from engine.parallel.sharding import Member, split_rows


class MLP(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden]. Gate and up are one projection, stacked per rank as [gate; up]."""

    def __init__(self, name: str, parts: Parts) -> None:
        super().__init__()
        config = parts.config
        self.activation = partial(bias_gelu, bias=None, by=parts.kernels.activation) if config.family == "gpt2" else (
            partial(swiglu, by=parts.kernels.activation))
        projections = ("up_proj",) if config.family == "gpt2" else ("gate_proj", "up_proj")
        self.up = ColumnParallelLinear(
            _stack(name, projections, "weight", parts, (config.hidden,)),
            _stack(name, projections, "bias", parts, ()) if config.mlp_bias else (),
            inputs=config.hidden, std=config.init_std, tp=parts.tp, dtype=parts.dtype, device=parts.device)
        self.down = RowParallelLinear(
            f"{name}.down_proj", config.ffn_hidden, config.hidden, bias=config.mlp_bias, std=parts.residual_std,
            tp=parts.tp, dtype=parts.dtype, device=parts.device)

    def forward(self, x: torch.Tensor, remade: Remade | None = None) -> torch.Tensor:
        """`remade`: how the backward pass makes x again; then it makes the activation again too."""
        wide = self.up(x, remade)  # [batch, seq, ffn/tp, or twice that: gate and up]
        again = None if remade is None else Remade(self.activation, wide)
        return self.down(self.activation(wide), again)  # type: ignore[no-any-return]


def _stack(name: str, projections: tuple[str, ...], kind: str, parts: Parts,
           columns: tuple[int, ...]) -> tuple[Member, ...]:
    share = parts.tp.share(parts.config.ffn_hidden)
    return tuple(split_rows(f"{name}.{proj}.{kind}", (parts.config.ffn_hidden, *columns), parts.tp.rank, parts.tp.size,
                            row=i * share) for i, proj in enumerate(projections))
