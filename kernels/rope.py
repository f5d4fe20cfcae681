"""Rotary position embedding (RoFormer, arXiv:2104.09864) in Llama's half rotation.

With x = [x1, x2] split in the middle of a head: y = [x1 cos - x2 sin, x2 cos + x1 sin], cos and sin of position times
frequency theta^(-2i/d). Angles are made in float64 and rounded once. A table that is not of unit length (YaRN's,
arXiv:2309.00071, scales it) works as well: the backward is the transpose of that map, the same with -sin for sin, which
for a unit table is the inverse rotation.

Queries, keys and values lie in one tensor, the output of one projection. The forward turns queries and keys in its
memory; the backward writes the gradient of all three once, turned back and values copied.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.language import cdiv, jit_counting, power_of_two, rounded, tl, wide


def rope_table(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """cos and sin [seq, head_dim / 2] of `positions` [seq], in fp32 (fp64 where the model is fp64)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = torch.outer(positions.to(torch.float64), theta ** -exponent)
    return angles.cos().to(wide(dtype)), angles.sin().to(wide(dtype))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float, out: torch.Tensor) -> None:
    """out = x rotated by the angles (sign 1) or back (sign -1); [batch, seq, heads, head_dim], out may be x."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [seq, 1, head_dim / 2]
    a, b = x[..., :half].to(cos.dtype), x[..., half:].to(cos.dtype)
    first = (a * cos).addcmul_(b, sin, value=-sign)
    out[..., half:] = (b * cos).addcmul_(a, sin, value=sign)
    out[..., :half] = first


class _RopeSplit(torch.autograd.Function):
    """Rotation in place and the split into q, k, v in one, so that the backward writes one gradient and copies none."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int,
                kv_heads: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        turned = qkv[:, :, : heads + kv_heads]
        _rotate(turned, cos, sin, 1.0, out=turned)
        q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        q, k, v = (grad.transpose(1, 2) for grad in grads)  # [batch, seq, heads, head_dim]
        heads, kv_heads = q.shape[2], k.shape[2]
        grad = q.new_empty(*q.shape[:2], heads + 2 * kv_heads, q.shape[3])
        _rotate(q, cos, sin, -1.0, out=grad[:, :, :heads])
        _rotate(k, cos, sin, -1.0, out=grad[:, :, heads : heads + kv_heads])
        grad[:, :, heads + kv_heads :] = v
        return grad, None, None, None, None


@jit_counting("seq")
def _rope_kernel(q, k, v, y, cos, sin, seq, q_strides, k_strides, v_strides, y_strides, stride_dim, SIGN: tl.constexpr,
                 HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HEADS_V: tl.constexpr, HALF: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M heads of one token: those of q and k turned, those of v copied, into y, side by side. Strides are those
    of (batch, seq, head).

    Each head's address is chosen among the three sources, so that tiles are full whatever the three counts: one kv head
    a rank is common.
    """
    tiles: tl.constexpr = (HEADS_Q + HEADS_K + HEADS_V + BLOCK_M - 1) // BLOCK_M
    token = tl.program_id(0) // tiles
    batch, position = (token // seq).to(tl.int64), (token % seq).to(tl.int64)
    head = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    wide_head = head.to(tl.int64)
    cols = tl.arange(0, BLOCK_N)[None, :]
    # Chosen between whole tiles of addresses: chosen before `cols` is added, Triton 3.9 no longer sees that a thread's
    # are neighbours, and loads them one by one.
    source = q + batch * q_strides[0] + position * q_strides[1] + wide_head * q_strides[2] + cols * stride_dim
    if HEADS_K > 0:
        key = (k + batch * k_strides[0] + position * k_strides[1] + (wide_head - HEADS_Q) * k_strides[2]
               + cols * stride_dim)
        source = tl.where(head < HEADS_Q, source, key)
    if HEADS_V > 0:
        value = (v + batch * v_strides[0] + position * v_strides[1] + (wide_head - HEADS_Q - HEADS_K) * v_strides[2]
                 + cols * stride_dim)
        source = tl.where(head < HEADS_Q + HEADS_K, source, value)
    mask = (head < HEADS_Q + HEADS_K + HEADS_V) & (cols < HALF)
    a = tl.load(source, mask=mask, other=0).to(tl.float32)
    b = tl.load(source + HALF * stride_dim, mask=mask, other=0).to(tl.float32)
    c = tl.load(cos + position * HALF + cols, mask=cols < HALF, other=0).to(tl.float32)
    s = tl.load(sin + position * HALF + cols, mask=cols < HALF, other=0).to(tl.float32) * SIGN
    first, second = a * c - b * s, b * c + a * s
    if HEADS_V > 0:
        turned = head < HEADS_Q + HEADS_K
        first, second = tl.where(turned, first, a), tl.where(turned, second, b)
    target = y + batch * y_strides[0] + position * y_strides[1] + wide_head * y_strides[2] + cols * stride_dim
    tl.store(target, rounded(first, y.dtype.element_ty), mask=mask)
    tl.store(target + HALF * stride_dim, rounded(second, y.dtype.element_ty), mask=mask)


# A tile is at most 1,024 pairs of elements by 4 warps: a thread loads 8 neighbours of each half, 16 bytes of bf16 at a
# time, and so few registers are needed that 12 to 16 blocks, 32 bytes a thread in flight, fit on a multiprocessor of
# either architecture. Smaller tiles pay the table's loads and the launch of a block more often.
TILE_PAIRS = 1024
WARP_PAIRS = 256


def _tile(heads: int, half: int) -> dict[str, int]:
    """What is compiled for that many heads of 2 half columns."""
    block = power_of_two(half)
    heads = min(power_of_two(heads), max(1, TILE_PAIRS // block))
    return {"HALF": half, "BLOCK_M": heads, "BLOCK_N": block,
            "num_warps": max(1, min(TILE_PAIRS, heads * block) // WARP_PAIRS)}


def rope_launch(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> None:
    """Turns heads [0, turned) of qkv [batch, seq, heads, head_dim] in place, whatever its strides."""
    batch, seq, _, head_dim = qkv.shape
    if cos.shape != (seq, head_dim // 2) or sin.shape != cos.shape:  # a kernel would read beyond it
        raise ValueError(f"rope: cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}, both must be "
                         f"[seq, head_dim / 2], which is {(seq, head_dim // 2)}")
    if qkv.numel() == 0 or turned == 0:
        return
    tile = _tile(turned, head_dim // 2)
    strides, none = qkv.stride()[:3], (0, 0, 0)
    _rope_kernel[(batch * seq * cdiv(turned, tile["BLOCK_M"]),)](
        qkv, qkv, qkv, qkv, cos.contiguous(), sin.contiguous(), seq, strides, none, none, strides, qkv.stride(3),
        SIGN=1, HEADS_Q=turned, HEADS_K=0, HEADS_V=0, **tile)


def rope_backward_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor,
                         sin: torch.Tensor) -> torch.Tensor:
    """Gradients of q [batch, heads, seq, head_dim], k and v [batch, kv_heads, seq, head_dim], any strides, to that of
    qkv [batch, seq, heads + 2 kv_heads, head_dim], in one launch."""
    batch, heads, seq, head_dim = q.shape
    kv_heads = k.shape[1]
    grad = q.new_empty(batch, seq, heads + 2 * kv_heads, head_dim)
    if grad.numel() == 0:
        return grad
    tile = _tile(heads + 2 * kv_heads, head_dim // 2)
    # The elements of a head must be neighbours: a gradient that is not so is rare (a sum's, expanded) and copied.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    strides = [tuple(x.stride(i) for i in (0, 2, 1)) for x in (q, k, v)]
    _rope_kernel[(batch * seq * cdiv(heads + 2 * kv_heads, tile["BLOCK_M"]),)](
        q, k, v, grad, cos.contiguous(), sin.contiguous(), seq, *strides, grad.stride()[:3], 1, SIGN=-1, HEADS_Q=heads,
        HEADS_K=kv_heads, HEADS_V=kv_heads, **tile)
    return grad


@torch.library.custom_op("triax::rope_", mutates_args={"qkv"})
def _rope_op(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> None:
    rope_launch(qkv, cos, sin, turned)


@_rope_op.register_fake
def _(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> None:
    return None


@torch.library.custom_op("triax::rope_backward", mutates_args=())
def _rope_backward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor,
                      sin: torch.Tensor) -> torch.Tensor:
    return rope_backward_launch(q, k, v, cos, sin)


@_rope_backward_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] + k.shape[1] + v.shape[1], q.shape[3])


class _TritonRopeSplit(torch.autograd.Function):
    """As `_RopeSplit`, by the kernels.

    It gives the three views itself and does not mark qkv as dirty. Marked, qkv would have to be the only result
    (autograd allows one where what is changed is a view), the split would be a node of its own, and its backward would
    write a gradient of the whole before ours reads and writes it again: twice the traffic. So the change must be seen
    in another way: the op itself raises qkv's version, so that an earlier node that keeps qkv's values complains.
    Compiled, the function is traced into the one graph: the op becomes functional there, its result is split by views,
    and the compiler gives it qkv's memory back; the backward is the one op that writes the one gradient.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int,
                kv_heads: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        _rope_op(qkv, cos, sin, heads + kv_heads)
        ctx.shapes = [(qkv.shape[0], count, qkv.shape[1], qkv.shape[3]) for count in (heads, kv_heads, kv_heads)]
        q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        present = [grad for grad in grads if grad is not None]
        if not present:
            return None, None, None, None, None
        # Where a result is not used, one head of zeros stands for its gradient.
        q, k, v = (present[0].new_zeros(shape[-1]).expand(shape) if grad is None else grad
                   for grad, shape in zip(grads, ctx.shapes, strict=True))
        return _rope_backward_op(q, k, v, *ctx.saved_tensors), None, None, None, None


def rope_split(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, *,
               by: str = "torch") -> tuple[torch.Tensor, ...]:
    """Rotates q and k in the memory of qkv [batch, seq, heads + 2 kv_heads, head_dim] and gives views of it: q [batch,
    heads, seq, head_dim], k and v [batch, kv_heads, seq, head_dim]. cos, sin [seq, head_dim / 2]. By "torch" or
    "triton".

    qkv's values are used up; nothing else may need them.
    """
    if by not in ("torch", "triton"):
        raise ValueError(f"rope_split: by is {by!r}, there are 'torch' and 'triton'")
    function = _TritonRopeSplit if by == "triton" else _RopeSplit
    return function.apply(qkv, cos, sin, heads, kv_heads)  # type: ignore[no-any-return]
