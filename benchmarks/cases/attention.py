"""Attention at the shapes of 7B and 70B models: forward and backward, dense, packed and windowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases.base import Build, Case, Run
from engine.kernels.attention.backward import backward
from engine.kernels.attention.bounds import document_bounds
from engine.kernels.attention.forward import forward

Shape = tuple[int, int, int, int, int]
"""Batch, heads, kv heads, tokens, columns of a head."""


def tensors(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """q, k, v as views of one projection's output, as the model has them, and a gradient of y."""
    batch, heads, kv_heads, seq, d = shape
    make: Any = torch.empty if device.type == "meta" else torch.randn
    qkv = make(batch, seq, heads + 2 * kv_heads, d, device=device, dtype=dtype)
    parts = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    return [*parts, make(batch, seq, heads, d, device=device, dtype=dtype).transpose(1, 2)]


def bounds(documents: Sequence[int] | None, shape: Shape, device: torch.device) -> list[torch.Tensor | None]:
    """Start and end of each token's document."""
    if documents is None:
        return [None, None]
    if device.type == "meta":
        return [torch.empty(shape[0] * shape[3], dtype=torch.int32, device=device) for _ in range(2)]
    return list(document_bounds(torch.tensor(documents, device=device).cumsum(0), shape[0], shape[3]))


def ours(shape: Shape, way: str, documents: Sequence[int] | None = None, window: int = 0,
         dtype: torch.dtype = torch.bfloat16) -> Build:
    """Our launchers."""
    def build(device: torch.device) -> Run:
        q, k, v, dy = tensors(shape, device, dtype)
        start, end = bounds(documents, shape, device)
        scale = shape[-1] ** -0.5
        if way == "forward":
            return lambda: forward(q, k, v, start, end, True, window, scale)
        if device.type == "meta":
            y, lse = dy, torch.empty(dy.shape[:3], dtype=torch.float32, device=device)
        else:
            y, lse = forward(q, k, v, start, end, True, window, scale)
        return lambda: backward(dy, None, q, k, v, y, lse, start, end, True, window, scale)

    return build


def timed(call: Any, inputs: Sequence[torch.Tensor], dy: torch.Tensor, way: str) -> Run:
    """A differentiable call, one way."""
    if way == "forward":
        return lambda: call(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = call(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def sdpa(shape: Shape, way: str, backend: SDPBackend) -> Build:
    """One of torch's back-ends."""
    def build(device: torch.device) -> Run:
        *inputs, dy = tensors(shape, device)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape[1] != shape[2])

        return timed(call, inputs, dy, way)

    return build


def flex(shape: Shape, way: str, documents: Sequence[int]) -> Build:
    """FlexAttention, compiled, with a document mask."""
    def build(device: torch.device) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        *inputs, dy = tensors(shape, device)
        number = torch.repeat_interleave(torch.tensor(list(documents[1:]), device=device))

        def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
            return (number[q] == number[k]) & (q >= k)

        mask = create_block_mask(seen, None, None, shape[3], shape[3], device=device)
        compiled = torch.compile(flex_attention)
        return timed(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=shape[1] != shape[2]), inputs, dy,
                     way)

    return build


def varlen(shape: Shape, way: str, documents: Sequence[int]) -> Build:
    """torch's own attention over cumulative lengths, where this torch has it."""
    def build(device: torch.device) -> Run | None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return None
        *inputs, dy = tensors(shape, device)
        group = shape[1] // shape[2]
        flat = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in inputs]
        flat[1:] = [x.repeat_interleave(group, dim=1) for x in flat[1:]]
        edges = torch.tensor(documents, device=device).cumsum(0).int()
        longest = max(documents)
        return timed(lambda q, k, v: varlen_attn(q, k, v, edges, edges, longest, longest, is_causal=True), flat,
                     dy.transpose(1, 2).flatten(0, 1), way)

    return build


def case(name: str, shape: Shape, way: str, *, documents: Sequence[int] | None = None, window: int = 0,
         dtype: torch.dtype = torch.bfloat16, share: float) -> Case:
    """A case; of the products only what is seen counts."""
    batch, heads, kv_heads, seq, d = shape
    lengths = [seq] if documents is None else [n for n in documents if n]
    pairs = sum(n * min(n, window or n) - min(n, window or n) ** 2 / 2 for n in lengths)
    flops = int((4 if way == "forward" else 10) * batch * heads * d * pairs)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION}
    peers = {f"SDPA {peer}": sdpa(shape, way, backend) for peer, backend in backends.items()}
    if documents is not None:
        peers = {"FlexAttention": flex(shape, way, documents), "varlen_attn": varlen(shape, way, documents),
                 "SDPA flash, dense": sdpa(shape, way, SDPBackend.FLASH_ATTENTION)}
    said = f"{batch} x {heads}/{kv_heads} x {seq} x {d}{f', {name}' if name else ''}"
    return Case(kernel=f"attention {way}", shape=said, dtype="fp32" if dtype == torch.float32 else "bf16",
                build=ours(shape, way, documents, window, dtype), flops=flops, matmul=dtype != torch.float32,
                target=share, peers=peers)


SEVEN = (1, 32, 8, 8192, 128)
FOUR_DOCUMENTS = [0, 2048, 2048, 2048, 2048]
SHORT = 141
"""Tokens of a tiny case: two tiles of queries, the second one cut."""
Asked = tuple[str, Shape, dict[str, Any]]
REAL: list[Asked] = [
    ("", (2, 32, 8, 4096, 128), {}), ("", SEVEN, {}), ("", (1, 32, 8, 16384, 128), {}),
    ("70B, tp 8", (1, 8, 1, 8192, 128), {}), ("", (1, 32, 32, 8192, 64), {}), ("", (1, 16, 16, 8192, 256), {}),
    ("four documents", SEVEN, {"documents": FOUR_DOCUMENTS}), ("window 4096", SEVEN, {"window": 4096}),
    ("", (1, 8, 8, 2048, 64), {"dtype": torch.float32})]
SMALL: list[Asked] = [
    ("", (1, 4, 1, SHORT, 128), {}), ("", (1, 2, 2, SHORT, 64), {}), ("", (1, 1, 1, SHORT, 256), {}),
    ("four documents", (1, 2, 1, SHORT, 128), {"documents": [0, 5, 60, 50, 26]}),
    ("window 100", (1, 2, 1, SHORT, 128), {"window": 100}), ("", (1, 1, 1, SHORT, 64), {"dtype": torch.float32})]
# Targets of 420 and 300 TFLOP/s, as shares of 790.
CASES, TINY = ([case(name, shape, way, share=share, **more)
                for way, share in (("forward", 0.53), ("backward", 0.38)) for name, shape, more in asked]
               for asked in (REAL, SMALL))
