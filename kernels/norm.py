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

from engine.kernels.language import INTERPRETED, arch, cdiv, jit, power_of_two, processors, tl, triton


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        xw = x.to(wide(x.dtype))
        norm = torch.linalg.vector_norm(xw, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (xw * rstd).mul_(weight.to(xw.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
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
    """LayerNorm computed in fp32 whatever its input; it keeps x as it came, and the two statistics of each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        kind = wide(x.dtype)
        y, mean, rstd = torch.native_layer_norm(x.to(kind), x.shape[-1:], weight.to(kind), bias.to(kind), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        kind = rstd.dtype
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.to(kind), x.to(kind), x.shape[-1:], mean, rstd, weight.to(kind), bias.to(kind), [True] * 3)
        return grads[0].to(x.dtype), grads[1].to(weight.dtype), grads[2].to(bias.dtype), None


WIDEST = 32768
"""Columns a row may have by "triton"."""

# The number of rows changes from batch to batch: kernels must not be compiled anew because it is a multiple of 16.
counted = jit if triton is None else triton.jit(do_not_specialize=["count"])


@jit
def _starts(rows, group, strides):
    """Where rows begin: [ROWS, 1], int64; `group` and `strides` as of `_addressed`."""
    return ((rows // group).to(tl.int64) * strides[0] + (rows % group).to(tl.int64) * strides[1])[:, None]


@jit
def _narrow(x, like):
    """fp32 in the dtype that `like` points at, rounded to nearest even."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:  # the interpreter cuts the lower bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)


@counted
def _forward_kernel(x, branch, weight, bias, y, total, mean, rstd, group, x_strides, branch_strides, count, eps,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """ROWS whole rows. `branch` is None where nothing is added, `bias` is None for RMSNorm."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    real, columns = rows < count, cols < WIDTH
    mask = real[:, None] & columns
    out = rows.to(tl.int64)[:, None] * WIDTH + cols
    value = tl.load(x + _starts(rows, group, x_strides) + cols, mask, other=0.0).to(tl.float32)
    if branch is not None:
        value += tl.load(branch + _starts(rows, group, branch_strides) + cols, mask, other=0.0).to(tl.float32)
        rounded = _narrow(value, total)
        tl.store(total + out, rounded, mask)
        value = rounded.to(tl.float32)
    if bias is not None:
        centre = tl.sum(value, 1) / WIDTH
        tl.store(mean + rows, centre, real)
        value = tl.where(mask, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    tl.store(rstd + rows, scale, real)
    value *= scale[:, None]
    value *= tl.load(weight + cols, columns, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, columns, other=0.0).to(tl.float32)
    tl.store(y + out, _narrow(value, y), mask)


@counted
def _means_kernel(grad, x, weight, mean, rstd, means, group, grad_strides, x_strides, count,
                  CENTRED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """mean(g w xhat) of one row and, for LayerNorm, mean(g w), into means [2, count]."""
    row = tl.program_id(0) + tl.arange(0, 1)
    scale = tl.load(rstd + row)[:, None]
    along = tl.zeros([1, BLOCK], tl.float32)
    plain = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = cols < WIDTH
        gw = tl.load(grad + _starts(row, group, grad_strides) + cols, mask, other=0.0).to(tl.float32)
        gw *= tl.load(weight + cols, mask, other=0.0).to(tl.float32)
        xhat = tl.load(x + _starts(row, group, x_strides) + cols, mask, other=0.0).to(tl.float32)
        if CENTRED:
            xhat -= tl.load(mean + row)[:, None]
            plain += gw
        along += gw * (xhat * scale)
    tl.store(means + row, tl.sum(along, 1) / WIDTH)
    if CENTRED:
        tl.store(means + count + row, tl.sum(plain, 1) / WIDTH)


@counted
def _backward_kernel(grad, grad_total, x, weight, mean, rstd, means, grad_x, parts, group, grad_strides, total_strides,
                     x_strides, count, CENTRED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                     ROWS: tl.constexpr, STAGES: tl.constexpr):
    """Tiles of ROWS rows, from the program's on in steps of the grid; of whole rows or, where `means` are given, of the
    BLOCK columns of program_id(1). The program's sums of g xhat and of g go into parts [1 or 2, programs, WIDTH].
    """
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    columns = cols < WIDTH
    # A tile of equal rows: were it [1, BLOCK], its load would choose a layout of its own, and Triton then moves every
    # tile of x into that one, in which a row of 128 columns is spread over all warps (3 times the instructions).
    same = tl.zeros([ROWS, 1], tl.int32)
    w = tl.load(weight + same + cols, (same == 0) & columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        real = rows < count
        mask = real[:, None] & columns
        g = tl.load(grad + _starts(rows, group, grad_strides) + cols, mask, other=0.0).to(tl.float32)
        xhat = tl.load(x + _starts(rows, group, x_strides) + cols, mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, real, other=0.0)[:, None]
        if CENTRED:
            xhat -= tl.load(mean + rows, real, other=0.0)[:, None]
            grad_bias += g
        xhat *= scale
        grad_weight += g * xhat
        gw = g * w
        if means is None:
            result = gw - xhat * (tl.sum(gw * xhat, 1) / WIDTH)[:, None]
            if CENTRED:
                result -= (tl.sum(gw, 1) / WIDTH)[:, None]
        else:
            result = gw - xhat * tl.load(means + rows, real, other=0.0)[:, None]
            if CENTRED:
                result -= tl.load(means + count + rows, real, other=0.0)[:, None]
        result *= scale
        if grad_total is not None:
            result += tl.load(grad_total + _starts(rows, group, total_strides) + cols, mask, other=0.0).to(tl.float32)
        tl.store(grad_x + rows.to(tl.int64)[:, None] * WIDTH + cols, _narrow(result, grad_x), mask)
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
        sums += tl.load(parts + (which * programs + part) * WIDTH + cols, (part < programs) & (cols < WIDTH), other=0.0)
    result = tl.sum(sums, 0)[None, :]
    if which == 0:
        tl.store(grad_weight + cols, _narrow(result, grad_weight), cols < WIDTH)
    elif CENTRED:
        tl.store(grad_bias + cols, _narrow(result, grad_bias), cols < WIDTH)


def _levels(x: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of as few dims as the rows of x [..., width] can be counted by, outermost first."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size > 1:
            dims.append((size, stride))
    return dims or [(1, 0)]


def _addressed(*tensors: torch.Tensor | None) -> tuple[int, list[torch.Tensor | None], list[tuple[int, int] | None]]:
    """A group size, the tensors, and two strides for each: row i begins at (i // group) outer + (i % group) inner.

    That is enough for the heads of q in [batch, seq, heads, head_dim], sliced from a wider tensor. What it does not
    describe, and what has other neighbours than a row's columns, is copied.
    """
    group, found = 1, []
    for x in tensors:
        if x is not None:
            dims = _levels(x)
            if len(dims) > 2 or x.stride(-1) != 1 or (len(dims) == 2 and group not in (1, dims[1][0])):
                x = x.contiguous()
                dims = _levels(x)
            group = dims[1][0] if len(dims) == 2 else group
        found.append(x)
    strides: list[tuple[int, int] | None] = []
    for x in found:
        dims = [] if x is None else _levels(x)
        last = dims[-1][1] if dims else 0
        strides.append(None if x is None else (dims[0][1] if len(dims) == 2 else group * last, last))
    return group, found, strides


def _forward_tile(width: int) -> dict[str, int]:
    """A row of up to 4,096 columns by 4 warps, above that a warp for every 1,024 columns: 32 columns a thread, four
    loads of 16 bytes under way at once in bf16. That takes 40 to 80 registers, so 6 to 10 blocks of 4 warps (half as
    many of 8) are on a multiprocessor, with 64 KB or more under way where bandwidth times latency is about 30 KB.
    Narrower rows are taken together to as many elements: those of a head (64 to 256) are then summed inside a warp."""
    block = power_of_two(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": min(64, max(1, 4096 // block)),
            "num_warps": max(4, min(32, block // 1024))}


SHARED = {80: 160 * 1024, 90: 224 * 1024, 100: 224 * 1024}
"""Bytes of shared memory that all blocks of a multiprocessor can have, by architecture; 96 KB elsewhere."""


def _backward_tile(width: int, column: int, centred: bool, gpu: int) -> tuple[int, dict[str, int]]:
    """Programs on a multiprocessor, and what is compiled; `column` is the bytes that are read of one column.

    The programs stay for the whole gradient, so that few partial sums are left to be added: loads cannot be hidden by
    other blocks that wait, and are issued ahead instead. Triton copies tiles into shared memory asynchronously, 16
    bytes a thread, STAGES - 1 tiles ahead; enough of them that 64 KB are under way on a multiprocessor.
    - Rows of 2,049 to 4,096: two programs of 4 warps. A thread holds 32 columns of w and of the sum in fp32, and x and
      g: about 168 registers. A row's arithmetic takes 440 instructions a warp, a third of the time its bytes take.
    - LayerNorm has a second sum: at 4 warps 250 registers, so it has twice the warps and half of each (about 125).
    - Rows of up to 8,192: the same with twice the warps, but one program, for its registers are half the file.
    - Wider rows do not fit in registers: their means come first, in a launch of their own that reads x and g once more,
      and then the columns are split among programs.
    - Heads (up to 256): tiles of 2,048 elements by 4 warps, 80 to 128 registers, four programs: there the arithmetic on
      row addresses counts, and more warps hide it.
    """
    block = min(8192, power_of_two(width))
    each = 4 if block <= 256 else 2 if block <= 4096 else 1
    rows = min(64, max(1, (2048 if block <= 256 else 4096) // block))
    warps = max(4, block // 1024) * (2 if centred and block > 256 else 1)
    fit = SHARED.get(gpu, 96 * 1024) // (each * rows * block * column)
    ahead = min(fit, max(2, min(3, cdiv(65536, each * rows * min(width, block) * column))))
    return each, {"CENTRED": centred, "WIDTH": width, "BLOCK": block, "ROWS": rows, "STAGES": 1 + ahead,
                  "num_warps": warps}


def _outputs(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
             eps: float) -> tuple[torch.Tensor, ...]:
    """What `forward` returns, not yet written."""
    count = x.numel() // max(1, x.shape[-1])
    return (x.new_empty(x.shape), x.new_empty(0 if branch is None else x.shape),
            x.new_empty(0 if bias is None else count, dtype=torch.float32), x.new_empty(count, dtype=torch.float32))


def forward(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
            eps: float) -> tuple[torch.Tensor, ...]:
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


def _gradients(grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
               bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `backward` returns, not yet written."""
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            weight.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def backward(grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
             bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of x (which is that of a branch too), of weight and of bias (empty without one), from those of y and of
    total; x is what was normalised: total where something was added."""
    grad_x, grad_weight, grad_bias = _gradients(grad, grad_total, x, weight, bias, mean, rstd)
    width, count, centred = x.shape[-1], rstd.numel(), bias is not None
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    column = sum(t.element_size() for t in (grad, grad_total, x) if t is not None)
    each, tile = _backward_tile(width, column, centred, arch(x.device))
    blocks = cdiv(width, tile["BLOCK"])
    programs = min(cdiv(count, tile["ROWS"]), cdiv(each * processors(x.device), blocks))
    parts = x.new_empty((1 + centred, programs, width), dtype=torch.float32)
    group, (grad_, total_, x_), strides = _addressed(grad, grad_total, x)
    weight_, means = weight.contiguous(), None
    if blocks > 1:
        means = x.new_empty((2, count), dtype=torch.float32)
        _means_kernel[(count,)](grad_, x_, weight_, mean, rstd, means, group, strides[0], strides[2], count,
                                CENTRED=centred, WIDTH=width, BLOCK=4096, num_warps=8)
    _backward_kernel[(programs, blocks)](grad_, total_, x_, weight_, mean, rstd, means, grad_x, parts, group, *strides,
                                         count, **tile)
    # 16 KB a block, in loads that do not wait for each other: the sums of a gradient are spread over 128 blocks.
    _parts_kernel[(cdiv(width, 32), 1 + centred)](parts, grad_weight, grad_bias, programs, CENTRED=centred, WIDTH=width,
                                                  PARTS=128, BLOCK=32, num_warps=8)
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, branch, weight, bias, _ = inputs
    ctx.added = branch is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.added else x, weight, bias, *output[2:])


def _differentiate(ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None,
                   *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad_total = grad_total if ctx.added else None
    if grad is None:
        return grad_total, grad_total, None, None, None
    grad_x, grad_weight, grad_bias = _norm_backward_op(grad, grad_total, x, weight, bias, mean, rstd)
    return grad_x, grad_x if ctx.added else None, grad_weight, None if bias is None else grad_bias, None


_norm_op.register_autograd(_differentiate, setup_context=_keep)


def _triton(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
            eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y and total, by the kernels."""
    if x.shape[-1] > WIDEST:
        raise ValueError(f"a norm by 'triton' takes rows of up to {WIDEST} columns, x has {x.shape[-1]}")
    if branch is not None and (branch.shape, branch.dtype) != (x.shape, x.dtype):
        raise ValueError(f"what is added must be like x, {x.dtype} {list(x.shape)}: it is {branch.dtype} "
                         f"{list(branch.shape)}")
    y, total, _, _ = _norm_op(x, branch, weight, bias, eps)
    return y, total


@lru_cache
def apex_norm(kind: str) -> Callable[..., torch.Tensor] | None:
    """NVIDIA Apex's norm, "rms" (x, weight, shape, eps) or "layer" (x, weight, bias, shape, eps); None where it is not,
    or does not give what torch gives for a few numbers: PyPI has another project of that name."""
    try:
        from apex.normalization import fused_layer_norm as apex

        ours, theirs = ((F.rms_norm, apex.fused_rms_norm_affine) if kind == "rms" else
                        (F.layer_norm, apex.fused_layer_norm_affine))
        x, *parameters = torch.linspace(-1, 2, 96 if kind == "rms" else 128, device="cuda").view(-1, 32).split(
            [2] + [1] * (1 if kind == "rms" else 2))
        parameters = [p.view(32) for p in parameters]
        good = torch.allclose(theirs(x, *parameters, (32,), 1e-5), ours(x, (32,), *parameters, 1e-5), atol=1e-5)
        return theirs if good else None
    except Exception:  # whatever is wrong with it, it is not what was looked for
        return None


def _apex(kind: str, by: str) -> Callable[..., torch.Tensor]:
    if by != "apex":
        raise ValueError(f"a norm's by is {by!r}; there are 'torch', 'triton' and 'apex'")
    found = apex_norm(kind)
    if found is None:
        raise RuntimeError("NVIDIA Apex is not installed here, or its norms do not give the right numbers")
    return found


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, by: str = "torch") -> torch.Tensor:
    """x [..., width], weight [width] -> [..., width]; by "torch", "triton" or "apex"."""
    if by == "torch":
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
    if by == "triton":
        return _triton(x, None, weight, None, eps)[0]
    return _apex("rms", by)(x, weight, x.shape[-1:], eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *,
               by: str = "torch") -> torch.Tensor:
    """x [..., width], weight and bias [width] -> [..., width]; by "torch", "triton" or "apex".

    On a CPU torch sums the gradients of weight and bias in the dtype they have: over 4,096 rows of bf16 half of a bias'
    gradient is lost. Its CUDA kernel sums in fp32.
    """
    if by == "triton":
        return _triton(x, None, weight, bias, eps)[0]
    if by != "torch":
        return _apex("layer", by)(x, weight, bias, x.shape[-1:], eps)
    if x.is_cuda:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, *,
                 by: str = "torch") -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(total), total), total = x + branch rounded to their dtype: the next residual, and what is normalised.

    By "triton" both ways are one pass each: the gradient of total is added in the norm's backward.
    """
    if by == "triton":
        return _triton(x, branch, weight, None, eps)
    total = x + branch
    return rms_norm(total, weight, eps, by=by), total


def add_layer_norm(x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *,
                   by: str = "torch") -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm`, with LayerNorm."""
    if by == "triton":
        return _triton(x, branch, weight, bias, eps)
    total = x + branch
    return layer_norm(total, weight, bias, eps, by=by), total
