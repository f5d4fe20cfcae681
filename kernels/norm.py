"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) over the last dim, with or without a residual addition.

RMSNorm: y = w xhat, xhat = x / rms(x), rms(x) = sqrt(mean(x^2) + eps). With g the gradient of y:
gw = sum over rows of g xhat;  gx = (g w - xhat mean(g w xhat)) / rms(x).
LayerNorm: y = w xhat + b, xhat = (x - mean(x)) / std(x), std(x) = sqrt(var(x) + eps); gw as above, gb = sum of g;
gx = (g w - mean(g w) - xhat mean(g w xhat)) / std(x).
Before a norm stands `total = x + branch`, rounded: both get gx plus the gradient of total.
Statistics are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.language import INTERPRETING, arch, cdiv, jit, jit_counting, narrow, power_of_two, processors, tl

Maybe = Tensor | None
Tensors = tuple[Tensor, ...]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        xw = x.to(wide(x.dtype))
        norm = torch.linalg.vector_norm(xw, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (xw * rstd).mul_(weight.to(xw.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        rows = x.to(rstd.dtype).reshape(-1, width)
        g, r = grad.to(rstd.dtype).reshape(-1, width), rstd.reshape(-1, 1)
        w = weight.to(rstd.dtype)
        product = g * rows  # two matrix-vector products of it give both sums: few passes over memory
        grad_weight = (product.t() @ r).squeeze(-1)
        mean = (product @ w).unsqueeze(-1).mul_(r.pow(3)).div_(width)  # [rows, 1]
        grad_x = torch.mul(g, w, out=product).mul_(r).addcmul_(rows, mean, value=-1)
        return grad_x.view_as(x).to(x.dtype), grad_weight.to(weight.dtype), None


class _LayerNorm(torch.autograd.Function):
    """Computed in fp32 whatever its input; it keeps x as it came, and two statistics a row. On a CPU torch's own sums
    the gradients of weight and bias in their dtype (on CUDA in fp32): of 4,096 rows in bf16 half a bias' is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        kind = wide(x.dtype)
        y, mean, rstd = torch.native_layer_norm(x.to(kind), x.shape[-1:], weight.to(kind), bias.to(kind), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        kind = rstd.dtype
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.to(kind), x.to(kind), x.shape[-1:], mean, rstd, weight.to(kind), bias.to(kind), [True] * 3)
        return grads[0].to(x.dtype), grads[1].to(weight.dtype), grads[2].to(bias.dtype), None


WIDEST = 32768  # columns of a row that fit in one block's registers
SHARED = {80: 160 * 1024, 90: 224 * 1024, 100: 224 * 1024}  # bytes a multiprocessor's blocks share; elsewhere 96 KB


@jit
def _read(x, rows, group, strides, cols, mask, policy: tl.constexpr):
    """Columns of rows as fp32, 0 where masked; `group` and `strides` as of `_addressed`."""
    starts = (rows // group).to(tl.int64) * strides[0] + (rows % group).to(tl.int64) * strides[1]
    return tl.load(x + starts[:, None] + cols, mask, 0.0, eviction_policy=policy).to(tl.float32)


@jit_counting("count")
def _forward_kernel(x, branch, weight, bias, y, total, mean, rstd, group, x_strides, branch_strides, count, eps,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """ROWS whole rows; `branch` is None where nothing is added, `bias` is None for RMSNorm. What is read once leaves
    the L1 cache to the weight, which every block reads."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    real, columns = rows < count, cols < WIDTH
    mask = real[:, None] & columns
    out = rows.to(tl.int64)[:, None] * WIDTH + cols
    value = _read(x, rows, group, x_strides, cols, mask, "evict_first")
    if branch is not None:
        value += _read(branch, rows, group, branch_strides, cols, mask, "evict_first")
        stored = narrow(value, total)
        tl.store(total + out, stored, mask)
        value = stored.to(tl.float32)
    if bias is not None:
        centre = tl.sum(value, 1) / WIDTH
        tl.store(mean + rows, centre, real)
        value = tl.where(mask, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    tl.store(rstd + rows, scale, real)
    value = value * scale[:, None] * tl.load(weight + cols, columns, 0.0, eviction_policy="evict_last").to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, columns, 0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y + out, narrow(value, y), mask)


@jit_counting("count")
def _backward_kernel(grad, grad_total, x, weight, mean, rstd, grad_x, parts, group, grad_strides, total_strides,
                     x_strides, count, CENTRED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                     ROWS: tl.constexpr, STAGES: tl.constexpr):
    """Tiles of ROWS rows, from the program's on in steps of the grid, by the BLOCK columns of program_id(1). Sums of
    g xhat and of g over a program's rows go into parts [1 or 2, programs, WIDTH]."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    columns = cols < WIDTH
    # A tile of equal rows. A load of [1, BLOCK] would choose a layout of its own, and Triton then moves every tile of x
    # into that one, in which the 128 columns of a head are spread over all warps: 3 times the instructions.
    same = tl.zeros([ROWS, 1], tl.int32)
    w = tl.load(weight + same + cols, (same == 0) & columns, 0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        real = rows < count
        mask = real[:, None] & columns
        g = _read(grad, rows, group, grad_strides, cols, mask, "")
        xhat = _read(x, rows, group, x_strides, cols, mask, "")
        scale = tl.load(rstd + rows, real, 0.0)[:, None]
        centre = tl.load(mean + rows, real, 0.0)[:, None] if CENTRED else 0.0
        xhat = (xhat - centre) * scale
        grad_weight += g * xhat
        grad_bias += g
        gw = g * w
        along, plain = tl.sum(gw * xhat, 1), tl.sum(gw, 1)
        for other in range(1, blocks):  # a wider row's other columns, which other programs write
            at = (tl.program_id(1) + other) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
            there = real[:, None] & (at < WIDTH)
            gw_there = _read(grad, rows, group, grad_strides, at, there, "")
            gw_there *= tl.load(weight + at, at < WIDTH, 0.0).to(tl.float32)
            along += tl.sum(gw_there * ((_read(x, rows, group, x_strides, at, there, "") - centre) * scale), 1)
            plain += tl.sum(gw_there, 1)
        result = gw - xhat * (along / WIDTH)[:, None]
        if CENTRED:
            result -= (plain / WIDTH)[:, None]
        result *= scale
        if grad_total is not None:
            result += _read(grad_total, rows, group, total_strides, cols, mask, "")
        tl.store(grad_x + rows.to(tl.int64)[:, None] * WIDTH + cols, narrow(result, grad_x), mask)
    part = parts + tl.program_id(0) * WIDTH + cols
    tl.store(part, tl.sum(grad_weight, 0)[None, :], columns)
    if CENTRED:
        tl.store(part + tl.num_programs(0) * WIDTH, tl.sum(grad_bias, 0)[None, :], columns)


@jit
def _parts_kernel(parts, grad_weight, grad_bias, programs, CENTRED: tl.constexpr, WIDTH: tl.constexpr,
                  PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of all programs' parts, always in one order: BLOCK columns of the gradient of weight (0) or bias (1)."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    which = tl.program_id(1)
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in tl.range(0, programs, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        sums += tl.load(parts + (which * programs + part) * WIDTH + cols, (part < programs) & (cols < WIDTH), 0.0)
    result = tl.sum(sums, 0)[None, :]
    if which == 0:
        tl.store(grad_weight + cols, narrow(result, grad_weight), cols < WIDTH)
    elif CENTRED:
        tl.store(grad_bias + cols, narrow(result, grad_bias), cols < WIDTH)


def _levels(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of as few dims as the rows of x [..., width] can be counted by, outermost first."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size > 1:
            dims.append((size, stride))
    return dims or [(1, 0)]


def _addressed(*tensors: Maybe) -> tuple[int, list[Maybe], list[tuple[int, int]]]:
    """A group size, the tensors, and two strides for each: row i begins at (i // group) outer + (i % group) inner.
    That is enough for the heads of q in [batch, seq, heads, head_dim], sliced from a wider tensor. What it does not
    describe, and what has other neighbours than a row's columns, is copied."""
    group, found = 1, list(tensors)
    for i, x in enumerate(tensors):
        if x is not None:
            inner = [size for size, _ in _levels(x)[1:]]
            if x.stride(-1) != 1 or len(inner) > 1 or (inner and group not in (1, inner[0])):
                found[i] = x.contiguous()
            elif inner:
                group = inner[0]
    levels = [[(1, 0)] if x is None else _levels(x) for x in found]
    return group, found, [(dims[0][1] * (group if len(dims) == 1 else 1), dims[-1][1]) for dims in levels]


def _forward_tile(width: int) -> dict[str, int]:
    """A row of up to 4,096 columns by 4 warps, above that a warp for every 1,024 columns: 32 columns a thread, four
    loads of 16 bytes under way at once in bf16. That takes 40 to 80 registers, so 6 to 10 blocks of 4 warps (half as
    many of 8) are on a multiprocessor, with 64 KB or more under way where bandwidth times latency is about 30 KB.
    Narrower rows are taken together to as many elements: a head's (64 to 256) are then summed inside a warp."""
    block = power_of_two(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": min(64, max(1, 4096 // block)),
            "num_warps": max(4, min(32, block // 1024))}


def _backward_tile(width: int, column: int, centred: bool, gpu: int) -> tuple[int, dict[str, int]]:
    """Programs on a multiprocessor, and what is compiled; `column` is the bytes read of one column.
    Programs stay for the whole gradient, so that few sums are left to be added. With so few no block waits while
    another computes, so tiles are loaded ahead: Triton copies them into shared memory asynchronously, 16 bytes a
    thread, STAGES - 1 of them at a time, chosen for 64 KB under way on a multiprocessor.
    - Rows of 257 to 4,096: tiles of 4,096 elements, two programs of 4 warps. A thread holds 32 columns of x and g, and
      of w and the sum in fp32: 168 registers. A tile takes 440 instructions, a third of the time its bytes take.
    - LayerNorm has a second sum, at 4 warps 250 registers: twice the warps with half of each, about 125.
    - Rows of up to 8,192: twice the warps, and one program, for it has more than half of the register file.
    - Wider rows do not fit: programs have 8,192 columns each, and read the others for the means, out of the L2 cache.
    - Heads (up to 256): tiles of 2,048 elements, 72 to 128 registers, four programs of 4 warps: with addresses, the
      arithmetic takes 60 % of the time their bytes take, and more warps hide it.
    """
    block = min(8192, power_of_two(width))
    each = 4 if block <= 256 else 2 if block <= 4096 else 1
    rows = min(64, max(1, (2048 if block <= 256 else 4096) // block))
    warps = max(4, block // 1024) * (2 if centred and block > 256 else 1)
    if width > block:
        column = 2 * column + 4  # the other columns, and their weights
    fit = SHARED.get(gpu, 96 * 1024) // (each * rows * block * column)
    ahead = min(fit, max(2, min(3, cdiv(65536, each * rows * min(width, block) * column))))
    return each, {"CENTRED": centred, "WIDTH": width, "BLOCK": block, "ROWS": rows, "STAGES": 1 + ahead,
                  "num_warps": warps}


def _outputs(x: Tensor, branch: Maybe, weight: Tensor, bias: Maybe, eps: float) -> Tensors:
    """What `forward` returns, not yet written."""
    count = x.numel() // max(1, x.shape[-1])
    return (x.new_empty(x.shape), x.new_empty(0 if branch is None else x.shape),
            x.new_empty(0 if bias is None else count, dtype=torch.float32), x.new_empty(count, dtype=torch.float32))


def forward(x: Tensor, branch: Maybe, weight: Tensor, bias: Maybe, eps: float) -> Tensors:
    """y, total, mean and rstd: total is empty without a branch, mean without a bias, which is RMSNorm. x, branch and
    results [..., width], weight and bias [width]; the statistics are fp32, one a row."""
    y, total, mean, rstd = _outputs(x, branch, weight, bias, eps)
    if x.numel():
        group, (x_, branch_), strides = _addressed(x, branch)
        tile = _forward_tile(x.shape[-1])
        _forward_kernel[(cdiv(rstd.numel(), tile["ROWS"]),)](
            x_, branch_, weight.contiguous(), None if bias is None else bias.contiguous(), y, total, mean, rstd, group,
            *strides, rstd.numel(), eps, **tile)
    return y, total, mean, rstd


def _gradients(grad: Tensor, grad_total: Maybe, x: Tensor, weight: Tensor, bias: Maybe, *_: Tensor) -> Tensors:
    """What `backward` returns, not yet written."""
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            weight.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def backward(grad: Tensor, grad_total: Maybe, x: Tensor, weight: Tensor, bias: Maybe, mean: Tensor,
             rstd: Tensor) -> Tensors:
    """Gradients of x (which is that of a branch too), of weight and of bias (empty without one), from those of y and of
    total; x is what was normalised: total where something was added."""
    grad_x, grad_weight, grad_bias = _gradients(grad, grad_total, x, weight, bias, mean, rstd)
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    width, count, centred = x.shape[-1], rstd.numel(), bias is not None
    column = sum(t.element_size() for t in (grad, grad_total, x) if t is not None)
    each, tile = _backward_tile(width, column, centred, arch(x.device))
    blocks = cdiv(width, tile["BLOCK"])
    programs = min(cdiv(count, tile["ROWS"]), cdiv(each * processors(x.device), blocks))  # of rows
    parts = x.new_empty((1 + centred, programs, width), dtype=torch.float32)
    group, (grad_, total_, x_), strides = _addressed(grad, grad_total, x)
    _backward_kernel[(programs, blocks)](grad_, total_, x_, weight.contiguous(), mean, rstd, grad_x, parts, group,
                                         *strides, count, **tile)
    # 16 KB at a time, and 128 blocks for 4,096 columns; the interpreter's time is a millisecond a block, not its size.
    block = 1024 if INTERPRETING else 32
    _parts_kernel[(cdiv(width, block), 1 + centred)](parts, grad_weight, grad_bias, programs, CENTRED=centred,
                                                     WIDTH=width, PARTS=128, BLOCK=block, num_warps=8)
    return grad_x, grad_weight, grad_bias


_norm_op = torch.library.custom_op(
    "triax::norm", forward, mutates_args=(),
    schema="(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
_norm_op.register_fake(_outputs)
_norm_backward_op = torch.library.custom_op(
    "triax::norm_backward", backward, mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd) "
           "-> (Tensor, Tensor, Tensor)")
_norm_backward_op.register_fake(_gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.added, ctx.biased = inputs[1] is not None, inputs[3] is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.added else inputs[0], *inputs[2:4], *output[2:])


def _differentiate(ctx: Any, grad: Maybe, grad_total: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
    grad_total = grad_total if ctx.added else None
    if grad is None:
        return grad_total, grad_total, None, None, None
    grad_x, grad_weight, grad_bias = _norm_backward_op(grad, grad_total, *ctx.saved_tensors)
    return grad_x, grad_x if ctx.added else None, grad_weight, grad_bias if ctx.biased else None, None


_norm_op.register_autograd(_differentiate, setup_context=_keep)


class _NormAndItself(torch.autograd.Function):
    """A norm of x, and x itself. The gradients of both are added in the norm's backward pass before they are rounded,
    as they are where a branch was added: bits do not depend on who made the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Maybe, eps: float) -> tuple[Tensor, Tensor]:
        y, _, mean, rstd = _norm_op(x, None, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Maybe, grad_total: Maybe) -> tuple[Maybe, ...]:  # type: ignore[override]
        if grad is None:
            return grad_total, None, None, None
        saved = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _norm_backward_op(grad, grad_total, *saved)
        return grad_x, grad_weight, None if saved[2] is None else grad_bias, None


def _triton(x: Tensor, branch: Maybe, weight: Tensor, bias: Maybe, eps: float) -> tuple[Tensor, Tensor]:
    """y and total, by the kernels. ValueError where x is too wide, or the branch is not like it."""
    if x.shape[-1] > WIDEST:
        raise ValueError(f"a norm by 'triton' takes rows of up to {WIDEST} columns, x has {x.shape[-1]}")
    if branch is not None and (branch.shape, branch.dtype) != (x.shape, x.dtype):
        kinds = [f"{t.dtype} {list(t.shape)}" for t in (x, branch)]
        raise ValueError(f"what is added must be like x: {kinds[1]} is not {kinds[0]}")
    if branch is None:
        return _NormAndItself.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    y, total, _, _ = _norm_op(x, branch, weight, bias, eps)
    return y, total


@lru_cache
def apex_norm(kind: str) -> Callable[..., Tensor] | None:
    """NVIDIA Apex's norm, "rms" (x, weight, shape, eps) or "layer" (x, weight, bias, shape, eps). None where it is not
    installed or gives other numbers than ours: PyPI has another project of that name."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

        x = torch.linspace(-1, 2, 96, device="cuda").view(3, 32)
        theirs, parameters = (fused_rms_norm_affine, [x[0]]) if kind == "rms" else (fused_layer_norm_affine, [*x[:2]])
        ours: Callable[..., Tensor] = rms_norm if kind == "rms" else layer_norm
        good = torch.allclose(theirs(x, *parameters, (32,), 1e-5), ours(x, *parameters, 1e-5), atol=1e-5)
    except Exception:  # whatever is wrong with it, it is not what was looked for
        return None
    return theirs if good else None


def _apex(kind: str, by: str) -> Callable[..., Tensor]:
    if by != "apex":
        raise ValueError(f"a norm's by is {by!r}; there are 'torch', 'triton' and 'apex'")
    if found := apex_norm(kind):
        return found
    raise RuntimeError("NVIDIA Apex is not installed here, or its norms do not give the right numbers")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, by: str = "torch") -> Tensor:
    """x [..., width], weight [width] -> [..., width]; by "torch", "triton" or "apex"."""
    if by == "triton":
        return _triton(x, None, weight, None, eps)[0]
    if by != "torch":
        return _apex("rms", by)(x, weight, x.shape[-1:], eps)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, by: str = "torch") -> Tensor:
    """x [..., width], weight and bias [width] -> [..., width]; by "torch", "triton" or "apex"."""
    if by == "triton":
        return _triton(x, None, weight, bias, eps)[0]
    if by != "torch":
        return _apex("layer", by)(x, weight, bias, x.shape[-1:], eps)
    if x.is_cuda:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, branch: Maybe, weight: Tensor, eps: float, *, by: str = "torch") -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total), total = x + branch rounded to their dtype: the next residual, and what is normalised.
    With a branch of None total is x. By "triton" it is one pass each way: the gradient of total is added in the norm's
    backward."""
    if by == "triton":
        return _triton(x, branch, weight, None, eps)
    total = x if branch is None else x + branch
    return rms_norm(total, weight, eps, by=by), total


def add_layer_norm(x: Tensor, branch: Maybe, weight: Tensor, bias: Tensor, eps: float, *,
                   by: str = "torch") -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`, with LayerNorm."""
    if by == "triton":
        return _triton(x, branch, weight, bias, eps)
    total = x if branch is None else x + branch
    return layer_norm(total, weight, bias, eps, by=by), total
