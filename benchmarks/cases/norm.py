"""RMSNorm and LayerNorm, alone and after the residual addition, each way; and the norm of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch

from cases.base import FEW, TOKENS, Build, Case, Run
from engine.kernels.norm import apex_norm
from engine.kernels.norm.backward import backward
from engine.kernels.norm.forward import forward

EPS = 1e-5
Shape = tuple[int, ...]
Call = Callable[..., Any]


def inputs(device: torch.device, shape: Shape, added: bool, centred: bool) -> list[torch.Tensor | None]:
    """x, what is added or None, weight, bias or None; in bf16."""
    def make(*size: int) -> torch.Tensor:
        x = torch.empty(size, dtype=torch.bfloat16, device=device)
        return x if device.type == "meta" else x.normal_()

    # Heads are a slice of the projection's output: q beside k and v.
    x = make(*shape) if len(shape) == 2 else make(shape[0], shape[1] * 3 // 2, shape[2])[:, : shape[1]]
    return [x, make(*shape) if added else None, make(shape[-1]), make(shape[-1]) if centred else None]


def ours(shape: Shape, way: str, added: bool, centred: bool) -> Build:
    """Our launchers."""
    def build(device: torch.device) -> Run:
        x, branch, weight, bias = inputs(device, shape, added, centred)
        assert x is not None and weight is not None
        if way == "forward":
            return lambda: forward(x, branch, weight, bias, EPS)
        y, total, mean, rstd = forward(x, branch, weight, bias, EPS)
        grad, grad_total = torch.empty_like(y).copy_(x), torch.empty_like(y).copy_(x) if added else None
        return lambda: backward(grad, grad_total, total if added else x, weight, bias, mean, rstd)

    return build


def plain(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The same in PyTorch's own functions."""
    total = x if branch is None else x + branch
    width = x.shape[-1:]
    y = F.rms_norm(total, width, weight, EPS) if bias is None else F.layer_norm(total, width, weight, bias, EPS)
    return y if branch is None else (y, total)


def liger(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Liger's functions; its fused addition is RMSNorm's."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_layer_norm, liger_rms_norm

    if branch is not None:
        return liger_fused_add_rms_norm(x, branch, weight, EPS)
    return liger_rms_norm(x, weight, EPS) if bias is None else liger_layer_norm(x, weight, bias, EPS)


def apex(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Apex's norms, after torch's addition."""
    total = x if branch is None else x + branch
    found = apex_norm("rms" if bias is None else "layer")
    assert found is not None
    y = found(total, weight, *(() if bias is None else (bias,)), x.shape[-1:], EPS)
    return y if branch is None else (y, total)


def peer(call: Call, shape: Shape, way: str, added: bool, centred: bool, here: Callable[[], object]) -> Build:
    """A differentiable call, one way; None where `here` finds nothing."""
    def build(device: torch.device) -> Run | None:
        if not here():
            return None
        leaves = [None if x is None else x.contiguous().requires_grad_() for x in inputs(device, shape, added, centred)]
        if way == "forward":
            return lambda: call(*leaves)
        with functorch.patch(donated_buffer=False):  # else a compiled backward runs once
            results = call(*leaves)
        outs = [results] if isinstance(results, torch.Tensor) else list(results)
        grads = [torch.randn_like(y) for y in outs]
        wanted = [leaf for leaf in leaves if leaf is not None]
        return lambda: torch.autograd.grad(outs, wanted, grads, retain_graph=True)

    return build


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def case(shape: Shape, said: str, way: str, added: bool, centred: bool) -> Case:
    """Forward reads x (and the branch), writes y (and the total); backward reads the gradient(s) and x, writes one."""
    kind = "LayerNorm" if centred else "RMSNorm"
    passes = {("forward", False): 2, ("forward", True): 4, ("backward", False): 3, ("backward", True): 4}[way, added]
    size = 1
    for length in shape:
        size *= length
    calls: dict[str, tuple[Call, Callable[[], object]]] = {
        "torch eager": (plain, lambda: True), "torch.compile": (torch.compile(plain), lambda: True)}
    if not (added and centred):
        calls["Liger"] = (liger, lambda: installed("liger_kernel"))
    calls["apex"] = (apex, lambda: apex_norm("layer" if centred else "rms"))
    return Case(
        kernel=f"{'add + ' if added else ''}{kind} {way}", shape=said, dtype="bf16", bytes=2 * passes * size,
        build=ours(shape, way, added, centred), target=0.85 if way == "forward" else 0.75,
        peers={name: peer(call, shape, way, added, centred, here) for name, (call, here) in calls.items()})


def cases(tokens: int) -> list[Case]:
    """Every width with so many rows."""
    return [case((tokens, *width), f"{tokens} x {said}", way, added, centred)
            for width, said, added, centred in (
                ((4096,), "4096 (7B)", False, False), ((4096,), "4096 (7B)", True, False),
                ((8192,), "8192 (70B)", True, False), ((5120,), "5120 (13B)", True, False),
                ((4096,), "4096", False, True), ((4096,), "4096", True, True),
                ((32, 128), "32 heads of 128", False, False))
            for way in ("forward", "backward")]


CASES, TINY = cases(TOKENS), cases(FEW)
