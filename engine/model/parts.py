"""What every part of a model needs to be built: its config, the tensor axis, dtype and device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.config import ModelConfig
from engine.config.check import VOCAB_MULTIPLE
from engine.config.recompute import NONE, Recompute
from engine.kernels.dispatch import Kernels
from engine.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from engine.parallel.collectives import TensorParallel
from engine.parallel.gradients import use
from engine.parallel.layers import replicated


@dataclass(frozen=True)
class Parts:
    """How to build: given once, handed down to every module."""

    config: ModelConfig
    tp: TensorParallel = field(default_factory=TensorParallel)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kernels: Kernels = field(default_factory=Kernels)
    recompute: Recompute = NONE

    @property
    def residual_std(self) -> float:
        """Initial std of projections into the residual stream (GPT-2: 1 / sqrt(2 layers) of the rest)."""
        return self.config.init_std / math.sqrt(2 * self.config.layers)

    @property
    def padded_vocab(self) -> int:
        """The vocabulary with its run-time padding rows."""
        return padded_vocab(self.config.vocab_size, self.tp.size)


def padded_vocab(vocab: int, tp: int) -> int:
    """`vocab` rounded up to a multiple of 64 x tp."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab // multiple) * multiple


class RMSNorm(nn.Module):
    """RMSNorm over the last dim; `partial` says that each tp rank's gradient is only a part (see `replicated`)."""

    def __init__(self, name: str, size: int, parts: Parts, partial: bool | None = None) -> None:
        super().__init__()
        self.eps = parts.config.norm_eps
        self.by = parts.kernels.norm
        self.weight = replicated(f"{name}.weight", size, 1.0, parts.tp, parts.dtype, parts.device, partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, use(self.weight), self.eps, by=self.by)  # type: ignore[no-any-return]

    def add(self, x: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x + branch), and x + branch; None stands for nothing to add."""
        return add_rms_norm(x, branch, use(self.weight), self.eps, by=self.by)  # type: ignore[no-any-return]


class LayerNorm(nn.Module):
    """LayerNorm over the last dim."""

    def __init__(self, name: str, size: int, parts: Parts) -> None:
        super().__init__()
        self.eps = parts.config.norm_eps
        self.by = parts.kernels.norm
        self.weight = replicated(f"{name}.weight", size, 1.0, parts.tp, parts.dtype, parts.device)
        self.bias = replicated(f"{name}.bias", size, 0.0, parts.tp, parts.dtype, parts.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, use(self.weight), use(self.bias), self.eps, by=self.by)  # type: ignore[no-any-return]

    def add(self, x: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x + branch), and x + branch; None stands for nothing to add."""
        return add_layer_norm(x, branch, use(self.weight), use(self.bias), self.eps, by=self.by)  # type: ignore[no-any-return]


Norm = RMSNorm | LayerNorm


def make_norm(name: str, parts: Parts) -> Norm:
    """The family's norm over the residual stream."""
    kind = LayerNorm if parts.config.family == "gpt2" else RMSNorm
    return kind(name, parts.config.hidden, parts)
