"""RoPE on q and k: forward in place (read and written once), backward into a fresh gradient that holds v's too."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cases.base import FEW, TOKENS, Build, Case, Run
from engine.kernels.rope import rope_backward_launch, rope_launch

HEAD_DIM = 128
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def inputs(device: torch.device, tokens: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """The projection's output [1, tokens, heads + 2 kv_heads, HEAD_DIM], and cos and sin of a table."""
    qkv = torch.empty(1, tokens, heads + 2 * kv_heads, HEAD_DIM, dtype=torch.bfloat16, device=device)
    angles = torch.empty(tokens, HEAD_DIM // 2, device=device)
    if device.type != "meta":
        qkv.normal_()
        angles.uniform_(0, 6.28)
    return qkv, angles.cos(), angles.sin()


def forward(tokens: int, heads: int, kv_heads: int) -> Build:
    def build(device: torch.device) -> Run:
        qkv, cos, sin = inputs(device, tokens, heads, kv_heads)
        return lambda: rope_launch(qkv, cos, sin, heads + kv_heads)

    return build


def backward(tokens: int, heads: int, kv_heads: int) -> Build:
    """From gradients as an attention kernel lays them out: [batch, heads, seq, head_dim]."""
    def build(device: torch.device) -> Run:
        qkv, cos, sin = inputs(device, tokens, heads, kv_heads)
        q, k, v = (x.contiguous() for x in qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], 1))
        return lambda: rope_backward_launch(q, k, v, cos, sin)

    return build


def rotate_half(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula as Hugging Face's models write it; q, k [batch, heads, seq, head_dim]."""
    cos, sin = (torch.cat([x, x], -1).to(q.dtype) for x in (cos, sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


def peer(tokens: int, heads: int, kv_heads: int, rotate: Rotate, sign: int) -> Build:
    """Fresh q and k from views of one tensor; the backward is the same work with -sin."""
    def build(device: torch.device) -> Run:
        qkv, cos, sin = inputs(device, tokens, heads, kv_heads)
        q, k, _ = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        return lambda: rotate(q, k, cos, sign * sin)

    return build


def liger(tokens: int, heads: int, kv_heads: int, sign: int) -> Build:
    """In place, where q and k each are one piece of memory, as it wants them."""
    def build(device: torch.device) -> Run | None:
        try:
            from liger_kernel.ops.rope import rope_backward, rope_forward
        except ImportError:
            return None
        qkv, cos, sin = inputs(device, tokens, heads, kv_heads)
        q, k = (x.contiguous().transpose(1, 2) for x in (qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads]))
        cos, sin = (torch.cat([x, x], -1).unsqueeze(0) for x in (cos, sin))
        return lambda: (rope_forward if sign > 0 else rope_backward)(q, k, cos, sin)

    return build


def case(tokens: int, heads: int, kv_heads: int, model: str, sign: int) -> Case:
    """Forward (sign 1) or backward (sign -1), at the heads that one rank has."""
    turned, written = heads + kv_heads, heads + kv_heads + (kv_heads if sign < 0 else 0)
    return Case(
        kernel="RoPE forward" if sign > 0 else "RoPE backward", dtype="bf16",
        shape=f"{tokens} x {heads}+{kv_heads} x {HEAD_DIM} ({model})",
        build=(forward if sign > 0 else backward)(tokens, heads, kv_heads),
        bytes=2 * tokens * written * HEAD_DIM * 2, target=0.80,
        peers={"torch eager, q and k": peer(tokens, heads, kv_heads, rotate_half, sign),
               "torch.compile, q and k": peer(tokens, heads, kv_heads, torch.compile(rotate_half), sign),
               f"Liger, {turned} heads": liger(tokens, heads, kv_heads, sign)})


CASES, TINY = ([case(tokens, heads, kv_heads, model, sign) for sign in (1, -1)
                for heads, kv_heads, model in ((32, 8, "7B"), (8, 1, "70B, tp 8"))] for tokens in (TOKENS, FEW))
