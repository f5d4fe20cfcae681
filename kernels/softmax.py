"""Softmax over keys of scaled and masked attention scores, whole rows in one read.

y = softmax(scale * scores + mask), the mask being 0 where a query may look and -inf elsewhere; with g the gradient of
y: dscores = scale * y (g - sum over keys of g y). A query that may look nowhere gets zeros, and so does its gradient.
Statistics are fp32 (fp64 for fp64 input); the result, which alone is kept, has the dtype of the scores.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.language import LOWEST, arch, cdiv, exp, jit, jit_counting, power_of_two, rounded, tl, wide


def _seen(scores: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor | None:
    """Which keys each query may look at, broadcast to the scores; None for all."""
    if not causal:
        return mask
    queries, keys = scores.shape[-2:]
    below = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril_(keys - queries)
    return below if mask is None else below & mask


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, scale: float, mask: torch.Tensor | None,
                causal: bool) -> torch.Tensor:
        x = scores.to(wide(scores.dtype)) * scale
        seen = _seen(scores, mask, causal)
        if seen is not None:
            x.masked_fill_(~seen, float("-inf"))
        y = x.softmax(-1)
        if seen is not None:
            y.masked_fill_(~seen.any(-1, keepdim=True), 0)
        y = y.to(scores.dtype)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        kind = wide(y.dtype)
        product = grad.to(kind) * y.to(kind)
        mean = product.sum(-1, keepdim=True)
        return product.addcmul_(y.to(kind), mean, value=-1).mul_(ctx.scale).to(y.dtype), None, None, None


@jit
def _starts(row, heads, queries, strides):
    """Where rows begin [BLOCK_M, 1], int64; rows are counted over batch, heads and queries, `strides` are theirs."""
    query, head, batch = row % queries, row // queries % heads, row // queries // heads
    start = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + query.to(tl.int64) * strides[2]
    return start[:, None]


@jit
def _ends(row, count, queries, keys, CAUSAL: tl.constexpr):
    """How many keys each row looks at [BLOCK_M, 1]; those below zero, and those of rows that are not there, at none."""
    end = tl.zeros_like(row) + keys
    if CAUSAL:
        end += row % queries + 1 - queries
    return tl.where(row < count, end, 0)[:, None]


@jit
def _load(x, start, cols, end, keys):
    """x at start + cols up to `end`, 0 beyond. The bound is rounded up, so that loads stay 16 bytes wide."""
    wanted = (cols < (end + 15) // 16 * 16) & (cols < keys)
    return tl.load(x + start + cols, mask=wanted, other=0)


@jit
def _logits(scores, mask, scale, start, mask_start, cols, end, keys):
    """scale * scores + mask of a tile."""
    x = _load(scores, start, cols, end, keys).to(tl.float32) * scale
    x = tl.where(cols < end, x, float("-inf"))
    if mask is not None:
        x = tl.where(_load(mask, mask_start, cols, end, keys) != 0, x, float("-inf"))
    return x


@jit
def _inverse(total):
    """1 / total, for a query that may look nowhere 1."""
    return 1 / tl.where(total == 0, 1.0, total)


@jit_counting("count")
def _forward_kernel(scores, mask, y, heads, queries, keys, score_strides, mask_strides, count, scale,
                    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr):
    """BLOCK_M rows: WHOLE ones in one tile, or in steps of BLOCK_N keys, once for the sum and once for the result."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = _starts(row, heads, queries, score_strides)
    mask_start = start
    if mask is not None:
        mask_start = _starts(row, heads, queries, mask_strides)
    end = _ends(row, count, queries, keys, CAUSAL)
    inside = (row < count)[:, None]
    y += row.to(tl.int64)[:, None] * keys
    cols = tl.arange(0, BLOCK_N)[None, :]
    if WHOLE:
        x = _logits(scores, mask, scale, start, mask_start, cols, end, keys)
        e = exp(x - tl.maximum(tl.max(x, 1), LOWEST)[:, None])
        p = e * _inverse(tl.sum(e, 1))[:, None]
        tl.store(y + cols, rounded(p, y.dtype.element_ty), mask=inside & (cols < keys))
    else:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, keys, BLOCK_N):
            x = _logits(scores, mask, scale, start, mask_start, first + cols, end, keys)
            higher = tl.maximum(top, tl.max(x, 1))
            total = total * exp(top - higher) + tl.sum(exp(x - higher[:, None]), 1)
            top = higher
        inverse = _inverse(total)
        for first in range(0, keys, BLOCK_N):
            x = _logits(scores, mask, scale, start, mask_start, first + cols, end, keys)
            e = exp(x - top[:, None]) * inverse[:, None]
            tl.store(y + first + cols, rounded(e, y.dtype.element_ty), mask=inside & (first + cols < keys))


@jit_counting("count")
def _backward_kernel(grad, y, out, heads, queries, keys, grad_strides, count, scale,
                     CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr):
    """The gradient of BLOCK_M rows of scores, in the same steps. Keys beyond the diagonal are not read."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = _starts(row, heads, queries, grad_strides)
    end = _ends(row, count, queries, keys, CAUSAL)
    inside = (row < count)[:, None]
    y_start = row.to(tl.int64)[:, None] * keys
    cols = tl.arange(0, BLOCK_N)[None, :]
    if WHOLE:
        p = _load(y, y_start, cols, end, keys).to(tl.float32)
        g = _load(grad, start, cols, end, keys).to(tl.float32)
        d = p * (g - tl.sum(p * g, 1)[:, None]) * scale
        tl.store(out + y_start + cols, rounded(d, out.dtype.element_ty), mask=inside & (cols < keys))
    else:
        mean = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, keys, BLOCK_N):
            p = _load(y, y_start, first + cols, end, keys).to(tl.float32)
            mean += tl.sum(p * _load(grad, start, first + cols, end, keys).to(tl.float32), 1)
        for first in range(0, keys, BLOCK_N):
            p = _load(y, y_start, first + cols, end, keys).to(tl.float32)
            g = _load(grad, start, first + cols, end, keys).to(tl.float32)
            d = p * (g - mean[:, None]) * scale
            tl.store(out + y_start + first + cols, rounded(d, out.dtype.element_ty),
                     mask=inside & (first + cols < keys))


# Keys at most -> num_warps. A row has one tile, BLOCK_N the power of two that holds it; short ones are taken together,
# BLOCK_M rows, to 2,048 keys. A thread has 32 keys, in four loads of 16 bytes (bf16), and a program at least two warps.
# At the 50 to 80 registers this takes, 24 warps or more are on a multiprocessor, each with 2 KiB under way: 48 KiB,
# where memory's rate times its latency asks for 26. Held to 64 registers for more warps, the backward kernel spills. A
# row of 16,384 keys has a multiprocessor to itself in the backward pass (16 warps, 80 registers): the slowest case.
TILES = ((2048, 2), (4096, 4), (8192, 8), (16384, 16))
TILE_KEYS = 2048
WIDEST = TILES[-1][0]
"""Keys of a row that one tile holds."""
STEP_N, STEP_WARPS = 8192, 8
"""A longer row is read twice in steps of STEP_N keys, the second time from L2."""
INTERPRETED_KEYS = 16384
"""Interpreted, a program costs about as much whatever its size."""


def _tile(keys: int, device: torch.device) -> dict[str, Any]:
    """What is compiled for rows of `keys`."""
    block, warps = next(((power_of_two(keys), warps) for most, warps in TILES if keys <= most), (STEP_N, STEP_WARPS))
    together = TILE_KEYS if arch(device) else INTERPRETED_KEYS
    return {"BLOCK_M": max(1, together // block), "BLOCK_N": block, "WHOLE": keys <= WIDEST, "num_warps": warps}


def _launch(kernel: Any, arguments: tuple[Any, ...], strides: tuple[Any, ...], out: torch.Tensor, scale: float,
            causal: bool) -> None:
    batch, heads, queries, keys = out.shape
    if not out.numel():
        return
    count, tile = batch * heads * queries, _tile(keys, out.device)
    kernel[(cdiv(count, tile["BLOCK_M"]),)](
        *arguments, out, heads, queries, keys, *strides, count, scale, CAUSAL=causal, **tile)


def launch_forward(scores: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """scores, result [batch, heads, queries, keys]; the mask, boolean, is broadcast to them."""
    y = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(scores.shape).view(torch.uint8)
    strides = (scores.stride()[:3], None if mask is None else mask.stride()[:3])
    _launch(_forward_kernel, (scores, mask), strides, y, scale, causal)
    return y


def launch_backward(grad: torch.Tensor, y: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """The gradient of the scores; y is the result, contiguous."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    _launch(_backward_kernel, (grad, y), (grad.stride()[:3],), out, scale, causal)
    return out


forward = torch.library.custom_op("triax::scaled_masked_softmax", launch_forward, mutates_args=())
backward = torch.library.custom_op("triax::scaled_masked_softmax_backward", launch_backward, mutates_args=())


@forward.register_fake
def _forward_fake(scores: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)


@backward.register_fake
def _backward_fake(grad: torch.Tensor, y: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)
    _, ctx.scale, _, ctx.causal = inputs


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return backward(grad, ctx.saved_tensors[0], ctx.scale, ctx.causal), None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)


def scaled_masked_softmax(scores: torch.Tensor, scale: float, *, mask: torch.Tensor | None = None,
                          causal: bool = False, by: str = "torch") -> torch.Tensor:
    """softmax(scale * scores) over the keys that a query may look at, 0 elsewhere and where it may look at none.

    scores, result [batch, heads, queries, keys]; mask [batch or 1, heads or 1, queries or 1, keys], boolean, True where
    a query may look; causal: query i looks at the keys up to keys - queries + i. `by` is torch, or triton: fp32, fp16
    and bf16, each way in one kernel. Raises ValueError for a mask of another shape or dtype.
    """
    if mask is not None:
        pairs = zip(mask.shape, scores.shape, strict=False)
        fits = mask.dim() == 4 and mask.shape[-1] == scores.shape[-1] and all(m in (1, n) for m, n in pairs)
        if mask.dtype != torch.bool or not fits:
            raise ValueError(f"mask {mask.dtype} {list(mask.shape)} for scores {list(scores.shape)}: it must be "
                             "boolean, [batch or 1, heads or 1, queries or 1, keys]")
    if by == "torch":
        return _Softmax.apply(scores, scale, mask, causal)  # type: ignore[no-any-return]
    return {"triton": forward}[by](scores, scale, mask, causal)  # type: ignore[no-any-return]
