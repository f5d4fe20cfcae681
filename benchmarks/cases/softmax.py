"""Scaled masked softmax: scores read and written once forward; result and gradient read, one gradient written back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cases.base import Build, Case, Run
from engine.kernels.softmax import launch_backward, launch_forward

Shape = tuple[int, int, int, int]
SCALE = 128**-0.5
Attend = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def normal(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Scores, or a gradient."""
    return torch.randn(shape, dtype=dtype, device=device)


def padding(shape: Shape, device: torch.device) -> torch.Tensor:
    """A mask [batch, 1, 1, keys] whose last eighth of the keys is padding."""
    mask = torch.ones(shape[0], 1, 1, shape[3], dtype=torch.bool, device=device)
    mask[..., shape[3] - shape[3] // 8:] = False
    return mask


def forward(shape: Shape, dtype: torch.dtype, causal: bool, masked: bool) -> Build:
    """Our forward kernel."""
    def build(device: torch.device) -> Run:
        scores, mask = normal(shape, device, dtype), padding(shape, device) if masked else None
        return lambda: launch_forward(scores, SCALE, mask, causal)

    return build


def backward(shape: Shape, dtype: torch.dtype, causal: bool) -> Build:
    """Our backward kernel."""
    def build(device: torch.device) -> Run:
        y, grad = normal(shape, device, dtype).softmax(-1), normal(shape, device, dtype)
        return lambda: launch_backward(grad, y, SCALE, causal)

    return build


def formula(scores: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """In torch, step by step."""
    scores = scores * SCALE
    return (scores if seen is None else scores.masked_fill(~seen, float("-inf"))).softmax(-1)


def seen(shape: Shape, device: torch.device, causal: bool, masked: bool) -> torch.Tensor | None:
    """The mask and the diagonal in one."""
    mask = padding(shape, device) if masked else None
    if not causal:
        return mask
    below = torch.ones(shape[2:], dtype=torch.bool, device=device).tril(shape[3] - shape[2])
    return below if mask is None else below & mask


def peer(shape: Shape, dtype: torch.dtype, causal: bool, masked: bool, compiled: bool, both: bool) -> Build:
    """The formula's forward pass, or its backward pass alone."""
    def build(device: torch.device) -> Run:
        scores, look = normal(shape, device, dtype), seen(shape, device, causal, masked)
        attend: Attend = torch.compile(formula) if compiled else formula
        if not both:
            return lambda: attend(scores, look)
        y, grad = attend(scores.requires_grad_(), look), normal(shape, device, dtype)
        return lambda: torch.autograd.grad(y, scores, grad, retain_graph=True)

    return build


def cases(shape: Shape, dtype: torch.dtype = torch.bfloat16, causal: bool = False, masked: bool = False) -> list[Case]:
    """Both ways. Causal kernels read half; the floor is theirs."""
    numbers = shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
    read = numbers // 2 if causal else numbers
    text = " x ".join(map(str, shape)) + (", causal" if causal else "") + (", padding" if masked else "")
    kind = {2: "bf16", 4: "fp32"}[dtype.itemsize]

    def peers(both: bool) -> dict[str, Build]:
        return {"torch eager": peer(shape, dtype, causal, masked, False, both),
                "torch.compile": peer(shape, dtype, causal, masked, True, both)}

    return [Case(kernel="scaled masked softmax forward", shape=text, dtype=kind, bytes=read + numbers, target=0.85,
                 build=forward(shape, dtype, causal, masked), peers=peers(False)),
            Case(kernel="scaled masked softmax backward", shape=text, dtype=kind, bytes=2 * read + numbers, target=0.85,
                 build=backward(shape, dtype, causal), peers=peers(True))]


CASES = [*cases((4, 32, 2048, 2048)), *cases((4, 32, 2048, 2048), causal=True),
         *cases((4, 32, 2048, 2048), masked=True)[:1], *cases((1, 8, 8192, 8192), causal=True),
         *cases((1, 2, 16384, 16384), torch.float32), *cases((1, 1, 4096, 32768))]
# As many keys, few queries.
TINY = [*cases((1, 2, 5, 2048)), *cases((1, 2, 5, 2048), causal=True), *cases((2, 1, 5, 2048), masked=True)[:1],
        *cases((1, 1, 3, 8192), causal=True), *cases((1, 1, 3, 16384), torch.float32), *cases((1, 1, 3, 32768))]
