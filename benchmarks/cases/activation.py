"""SwiGLU, GEGLU and bias+GELU, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch

from cases.base import FEW, TOKENS, Build, Case, Run
from engine.kernels.activation import (
    bias_gelu_backward_launch,
    bias_gelu_launch,
    glu_backward_launch,
    glu_launch,
)

Formula = Callable[..., torch.Tensor]


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.empty(*shape, dtype=dtype, device=device)
    return x if device.type == "meta" else x.normal_()


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias, approximate="tanh")


def peer(formula: Formula, shapes: list[tuple[int, ...]], backward: bool, compiled: bool) -> Build:
    """A formula of inputs of some shapes, eager or compiled: itself, or the gradients of all its inputs."""
    def build(device: torch.device) -> Run:
        inputs = [normal(device, *shape).requires_grad_(backward) for shape in shapes]
        function = torch.compile(formula) if compiled else formula
        if not backward:
            return lambda: function(*inputs)
        with functorch.patch(donated_buffer=False):  # else a compiled backward runs once
            y = function(*inputs)
        grad = normal(device, *y.shape)
        return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

    return build


def liger(activation: str, tokens: int, ffn: int, backward: bool) -> Build:
    """From gate and up as two tensors; its backward writes over them."""
    def build(device: torch.device) -> Run | None:
        try:
            from liger_kernel.ops.geglu import geglu_backward, geglu_forward
            from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
        except ImportError:
            return None
        gate, up, grad = (normal(device, tokens, ffn) for _ in range(3))
        if backward:
            function = swiglu_backward if activation == "silu" else geglu_backward
            return lambda: function(gate, up, grad)
        function = swiglu_forward if activation == "silu" else geglu_forward
        return lambda: function(gate, up)

    return build


def glu_case(activation: str, ffn: int, model: str, backward: bool, tokens: int) -> Case:
    def build(device: torch.device) -> Run:
        gate_up, grad = normal(device, tokens, 2 * ffn), normal(device, tokens, ffn)
        if backward:
            return lambda: glu_backward_launch(grad, gate_up, activation)
        return lambda: glu_launch(gate_up, activation)

    name, formula = ("SwiGLU", swiglu) if activation == "silu" else ("GEGLU", geglu)
    shapes: list[tuple[int, ...]] = [(tokens, 2 * ffn)]
    return Case(
        kernel=f"{name} {'backward' if backward else 'forward'}", shape=f"{tokens} x 2 x {ffn} ({model})",
        dtype="bf16", build=build, bytes=(5 if backward else 3) * tokens * ffn * 2,
        target=0.88 if backward else 0.90,
        peers={"torch eager": peer(formula, shapes, backward, compiled=False),
               "torch.compile": peer(formula, shapes, backward, compiled=True),
               "Liger": liger(activation, tokens, ffn, backward)})


def bias_gelu_case(width: int, model: str, backward: bool, tokens: int) -> Case:
    def build(device: torch.device) -> Run:
        x, grad, bias = (normal(device, *shape) for shape in ((tokens, width), (tokens, width), (width,)))
        if backward:
            return lambda: bias_gelu_backward_launch(grad, x, bias)
        return lambda: bias_gelu_launch(x, bias)

    shapes: list[tuple[int, ...]] = [(tokens, width), (width,)]
    return Case(
        kernel=f"bias+GELU {'backward' if backward else 'forward'}", shape=f"{tokens} x {width} ({model})",
        dtype="bf16", build=build, bytes=(3 if backward else 2) * tokens * width * 2, target=0.85,
        peers={"torch eager": peer(bias_gelu, shapes, backward, compiled=False),
               "torch.compile": peer(bias_gelu, shapes, backward, compiled=True)})


def cases(tokens: int) -> list[Case]:
    return [case for backward in (False, True)
            for case in (glu_case("silu", 14336, "7B", backward, tokens),
                         glu_case("silu", 3584, "70B, tp 8", backward, tokens),
                         glu_case("gelu", 14336, "7B", backward, tokens),
                         bias_gelu_case(16384, "7B", backward, tokens))]


CASES, TINY = cases(TOKENS), cases(FEW)
