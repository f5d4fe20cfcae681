"""Which implementation each operation runs, decided once, before the first step.

An operation's function takes the answer as `by`; nothing looks at a tensor's device later. Whoever asks for what cannot
run here gets an error; only `auto` chooses, and the line it prints says what and why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.attention import WIDEST
from engine.kernels.language import INTERPRETING, triton
from engine.kernels.norm import apex_norm

KERNELS = ("auto", "triton", "torch", "apex")
ATTENTION = ("auto", "triton", "sdpa", "reference")


class KernelsUnavailable(ValueError):
    """What was asked for cannot run here; the text is for the user."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What runs each operation: words their functions take as `by`."""

    norm: str = "torch"
    rope: str = "torch"
    activation: str = "torch"
    loss: str = "torch"
    optimizer: str = "torch"
    attention: str = "sdpa"
    wide_products: bool = False
    """Weight gradients of bf16 are added to the fp32 bucket inside the matrix product, not after it."""
    why: str = ""

    def __str__(self) -> str:
        names = {"norms": self.norm, "RoPE": self.rope, "activation": self.activation, "loss": self.loss,
                 "optimizer": self.optimizer}
        by = {word: [name for name, found in names.items() if found == word] for word in dict.fromkeys(names.values())}
        text = "; ".join(f"{word} ({', '.join(operations)})" for word, operations in by.items())
        attention = "torch scaled_dot_product_attention" if self.attention == "sdpa" else self.attention
        sums = "; weight gradients added in the matrix product" if self.wide_products else ""
        return f"kernels: {text}; attention: {attention}{sums}{f' ({self.why})' if self.why else ''}"


def choose(kernels: str, attention: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 128,
           here: bool = True) -> Kernels:
    """The implementations for --kernels and --attention. `here` says that the device is this machine's: a plan for
    another one is believed. Raises KernelsUnavailable."""
    if kernels == "apex":
        _require_apex(device, dtype, here)
    obstacle = _triton_obstacle(device, dtype, here)
    if "triton" in (kernels, attention) and obstacle:
        flag = "kernels" if kernels == "triton" else "attention"
        raise KernelsUnavailable(f"--{flag} triton: {obstacle}")
    if attention == "triton" and head_dim > WIDEST:
        raise KernelsUnavailable(f"--attention triton: its tiles hold heads of up to {WIDEST} columns, --head-dim is "
                                 f"{head_dim}; use --attention sdpa")
    fused = "torch" if obstacle or kernels == "torch" or (kernels == "auto" and device.type == "cpu") else "triton"
    return Kernels(
        norm="apex" if kernels == "apex" else fused, rope=fused, activation=fused, loss=fused, optimizer=fused,
        attention=_attention(attention, fused, device, dtype, head_dim),
        wide_products=device.type == "cuda" and dtype in (torch.bfloat16, torch.float16),
        why=_why(kernels, device, obstacle))


def _attention(asked: str, fused: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What attention runs. Where nothing was asked for: ours with the other kernels, for its backward is deterministic;
    but in fp32 it has no tensor cores, and torch's is faster by far. The formula takes its softmax from the kernels."""
    if asked != "auto":
        return "unfused" if asked == "reference" and fused == "triton" else asked
    slow = device.type == "cuda" and dtype == torch.float32
    return "triton" if fused == "triton" and not slow and head_dim <= WIDEST else "sdpa"


def _triton_obstacle(device: torch.device, dtype: torch.dtype, here: bool) -> str:
    """Why Triton's kernels cannot run, in the user's words; empty where they can."""
    if dtype == torch.float64:
        return "its kernels compute in fp32, --dtype is fp64; use --kernels torch"
    if device.type == "cpu" and not INTERPRETING:
        return "a CPU runs no Triton kernel (only its interpreter does: set TRITON_INTERPRET=1); use --kernels torch"
    if here and triton is None:
        return "triton is not installed; pip install 'triax[gpu]', or use --kernels torch"
    if here and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"this GPU is sm_{major}{minor}, and the kernels need sm_80 or newer; use --kernels torch"
    return ""


def _require_apex(device: torch.device, dtype: torch.dtype, here: bool) -> None:
    if device.type != "cuda":
        raise KernelsUnavailable(f"--kernels apex: NVIDIA Apex runs on CUDA, --device is {device.type}")
    if here and apex_norm("rms") is None:
        raise KernelsUnavailable("--kernels apex: NVIDIA Apex is not installed here, or its norms give wrong numbers "
                                 "(the package `apex` on PyPI is another project); use --kernels auto")
    if dtype == torch.float64:
        raise KernelsUnavailable("--kernels apex: --dtype is fp64; use --kernels torch")


def _why(kernels: str, device: torch.device, obstacle: str) -> str:
    if kernels != "auto":
        return "asked for"
    if device.type == "cpu":
        return "a CPU"
    return f"not triton: {obstacle.partition(';')[0]}" if obstacle else "CUDA"
