"""The MLP's nonlinearities: SwiGLU and GEGLU (arXiv:2002.05202), tanh GELU (arXiv:1606.08415) and a bias before it.

With a an activation, y = a(gate) up. Only gate and up are kept; the backward computes a again:
d_up = g a(gate);  d_gate = g up a'(gate).
With s the logistic function: silu(x) = x s(x) and silu'(x) = s + x s (1 - s). The tanh GELU is x s(z) too, with
z = 2 sqrt(2 / pi) (x + 0.044715 x^3), for (1 + tanh(z / 2)) / 2 = s(z); gelu'(x) = s + x s (1 - s) dz/dx.
Bias and GELU: y = gelu(x + b);  d_x = g gelu'(x + b);  d_b = column sums of d_x.
The kernels compute in fp32 and round once; the sums for the bias are fp32 and always made in one order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from engine.kernels.language import LOG2E, cdiv, jit, jit_counting, power_of_two, processors, rounded, tl

# The reference, in torch.


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, dim=-1)
        return _activated(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(_activated(gate, ctx.activation), grad, out=grad_up)
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad * up, gate, approximate="tanh", grad_input=grad_gate)
        return both, None


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


# The kernels.

# z = x (Z1 + Z3 x^2), dz/dx = Z1 + 3 Z3 x^2.
Z1 = tl.constexpr(2 * math.sqrt(2 / math.pi))
Z3 = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


@jit
def _logistic(x, t, FINE: tl.constexpr):
    """x s, s and 1 - s, where s = 1 / (1 + 2^t).

    For 16-bit tensors by two instructions that flush what is denormal: exp and a division take three times as many,
    which guard numbers that do not come up here, and on Hopper these kernels have no instructions to give away. The few
    rounding errors of it would show in fp32, whose bytes leave twice the time.
    """
    if FINE:
        small = tl.exp2(-tl.abs(t))
        large = tl.div_rn(1.0, 1 + small)
        small *= large
        return tl.div_rn(x, 1 + tl.exp2(t)), tl.where(t < 0, large, small), tl.where(t < 0, small, large)
    else:
        root = tl.rsqrt(1 + tl.exp2(t))
        s = root * root
        return x * s, s, 1 - s


@jit
def _activate(x, GELU: tl.constexpr, FINE: tl.constexpr):
    """The activation of x (fp32) and its slope."""
    if GELU:
        square = x * x
        t = x * (-Z1 * LOG2E - Z3 * LOG2E * square)  # -z in powers of two
        y, s, rest = _logistic(x, t, FINE)
        return y, s + y * rest * (Z1 + 3 * Z3 * square)  # dz/dx
    else:
        y, s, rest = _logistic(x, x * -LOG2E, FINE)
        return y, s + y * rest


@jit
def _glu_kernel(gate_up, y, stride_row, FFN: tl.constexpr, GELU: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block of a row of y."""
    tiles: tl.constexpr = (FFN + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < FFN
    gate = tl.load(gate_up + row * stride_row + cols, mask=mask, other=0).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + FFN + cols, mask=mask, other=0).to(tl.float32)
    activated, _ = _activate(gate, GELU, gate_up.dtype.element_ty == tl.float32)
    tl.store(y + row * FFN + cols, rounded(activated * up, y.dtype.element_ty), mask=mask)


@jit
def _glu_backward_kernel(grad, gate_up, both, stride_grad, stride_row, FFN: tl.constexpr, GELU: tl.constexpr,
                         BLOCK_N: tl.constexpr):
    """A block of a row of d_gate and the same of d_up."""
    tiles: tl.constexpr = (FFN + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < FFN
    gate = tl.load(gate_up + row * stride_row + cols, mask=mask, other=0).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + FFN + cols, mask=mask, other=0).to(tl.float32)
    g = tl.load(grad + row * stride_grad + cols, mask=mask, other=0).to(tl.float32)
    activated, slope = _activate(gate, GELU, gate_up.dtype.element_ty == tl.float32)
    grads = both + row * 2 * FFN + cols
    tl.store(grads, rounded(g * up * slope, both.dtype.element_ty), mask=mask)
    tl.store(grads + FFN, rounded(g * activated, both.dtype.element_ty), mask=mask)


@jit_counting("rows")
def _bias_gelu_kernel(x, bias, y, rows, stride_row, WIDTH: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):
    """A tile of y; its rows share what is read of the bias."""
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (cols < WIDTH)
    sums = tl.load(x + row * stride_row + cols, mask=mask, other=0).to(tl.float32)
    if BIAS:
        sums += tl.load(bias + cols, mask=cols < WIDTH, other=0).to(tl.float32)
    activated, _ = _activate(sums, True, x.dtype.element_ty == tl.float32)
    tl.store(y + row * WIDTH + cols, rounded(activated, y.dtype.element_ty), mask=mask)


@jit_counting("rows")
def _bias_gelu_backward_kernel(grad, x, bias, grad_x, partial, rows, stride_grad, stride_row, WIDTH: tl.constexpr,
                               BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every so many rows of a block of columns: d_x, and their sum, one row of `partial` [programs, WIDTH]."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < WIDTH
    if BIAS:
        added = tl.load(bias + cols, mask=mask, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for number in range(tl.program_id(1), rows, tl.num_programs(1)):
        row = tl.cast(number, tl.int64)
        sums = tl.load(x + row * stride_row + cols, mask=mask, other=0).to(tl.float32)
        g = tl.load(grad + row * stride_grad + cols, mask=mask, other=0).to(tl.float32)
        if BIAS:
            sums += added
        _, slope = _activate(sums, True, x.dtype.element_ty == tl.float32)
        product = g * slope
        tl.store(grad_x + row * WIDTH + cols, rounded(product, grad_x.dtype.element_ty), mask=mask)
        total += product
    if BIAS:
        tl.store(partial + tl.program_id(1).to(tl.int64) * WIDTH + cols, total, mask=mask)


# The launchers.

# What a block, 4 warps, takes of a row of each tensor: 1,024 elements of bf16, 16 bytes a thread. So few registers are
# needed that 8 to 16 blocks fit on a multiprocessor, and 32 KB and more are on their way from memory: an H100's latency
# asks for 21 (4 TB/s times 0.7 us over 132). Models' widths are multiples of 1,024 or a little less than one.
BLOCK_BYTES = 2048
WARP_BYTES = 512
# Rows of a program of bias + GELU, which share what is read of the bias.
BIAS_GELU_M = 2
# Programs a multiprocessor has of its backward pass, where 48 to 58 registers let 8 to 10 in: one wave, however many
# rows there are, so that few sums of the bias are left to be added.
BIAS_GELU_BACKWARD_PROGRAMS = 8


def row_tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_N of a row and num_warps."""
    block = min(BLOCK_BYTES // dtype.itemsize, power_of_two(width))
    return {"BLOCK_N": block, "num_warps": max(1, block * dtype.itemsize // WARP_BYTES)}


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., width], not empty, as [rows, width] whose rows each are one piece of memory; copied only if it must be."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def check_bias(bias: torch.Tensor | None, width: int) -> None:
    """Raises ValueError if a kernel would read beyond the bias."""
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias is {tuple(bias.shape)}, {(width,)} is needed")


def glu_launch(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate_up [..., 2 ffn] -> silu(gate) up or gelu(gate) up, [..., ffn]; activation is "silu" or "gelu"."""
    ffn = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], ffn)
    if y.numel():
        flat = as_rows(gate_up)
        tile = row_tile(ffn, gate_up.dtype)
        _glu_kernel[(len(flat) * cdiv(ffn, tile["BLOCK_N"]),)](flat, y, flat.stride(0), FFN=ffn,
                                                             GELU=activation == "gelu", **tile)
    return y


def glu_backward_launch(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of gate_up [..., 2 ffn] from that of the result [..., ffn]."""
    ffn = grad.shape[-1]
    both = gate_up.new_empty(gate_up.shape)
    if both.numel():
        g, flat = as_rows(grad), as_rows(gate_up)
        tile = row_tile(ffn, gate_up.dtype)
        _glu_backward_kernel[(len(flat) * cdiv(ffn, tile["BLOCK_N"]),)](
            g, flat, both, g.stride(0), flat.stride(0), FFN=ffn, GELU=activation == "gelu", **tile)
    return both


def bias_gelu_launch(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., width], bias [width] -> gelu(x + bias)."""
    width = x.shape[-1]
    check_bias(bias, width)
    y = x.new_empty(x.shape)
    if y.numel():
        flat = as_rows(x)
        tile = row_tile(width, x.dtype)
        programs = cdiv(len(flat), BIAS_GELU_M) * cdiv(width, tile["BLOCK_N"])
        _bias_gelu_kernel[(programs,)](flat, x if bias is None else bias.contiguous(), y, len(flat), flat.stride(0),
                                       WIDTH=width, BIAS=bias is not None, BLOCK_M=BIAS_GELU_M, **tile)
    return y


def bias_gelu_backward_launch(grad: torch.Tensor, x: torch.Tensor,
                              bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x, and of bias in fp32 (of no elements without one)."""
    width = x.shape[-1]
    grad_x = x.new_empty(x.shape)
    if not grad_x.numel():
        return grad_x, x.new_zeros(0 if bias is None else width, dtype=torch.float32)
    g, flat = as_rows(grad), as_rows(x)
    tile = row_tile(width, x.dtype)
    columns = cdiv(width, tile["BLOCK_N"])
    chunks = min(cdiv(BIAS_GELU_BACKWARD_PROGRAMS * processors(x.device), columns), len(flat))
    partial = x.new_empty(chunks if bias is not None else 0, width, dtype=torch.float32)
    _bias_gelu_backward_kernel[(columns, chunks)](
        g, flat, x if bias is None else bias.contiguous(), grad_x, partial, len(flat), g.stride(0), flat.stride(0),
        WIDTH=width, BIAS=bias is not None, **tile)
    return grad_x, x.new_empty(0, dtype=torch.float32) if bias is None else partial.sum(0)


# The launchers as operators of torch.


@torch.library.custom_op("triax::glu", mutates_args=())
def _glu(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return glu_launch(gate_up, activation)


@_glu.register_fake
def _(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("triax::glu_backward", mutates_args=())
def _glu_backward(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return glu_backward_launch(grad, gate_up, activation)


@_glu_backward.register_fake
def _(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep_glu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.activation = inputs[1]


_glu.register_autograd(
    lambda ctx, grad: (_glu_backward(grad, ctx.saved_tensors[0], ctx.activation), None), setup_context=_keep_glu)


@torch.library.custom_op("triax::bias_gelu", mutates_args=())
def _bias_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return bias_gelu_launch(x, bias)


@_bias_gelu.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triax::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(grad: torch.Tensor, x: torch.Tensor,
                        bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return bias_gelu_backward_launch(grad, x, bias)


@_bias_gelu_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1], dtype=torch.float32)


def _keep_bias_gelu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias = inputs
    ctx.save_for_backward(x, bias)


def _bias_gelu_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype)


_bias_gelu.register_autograd(_bias_gelu_gradients, setup_context=_keep_bias_gelu)


# What models call.


def swiglu(gate_up: torch.Tensor, *, by: str = "torch") -> torch.Tensor:
    """silu(gate) up: [..., 2 ffn], gate first -> [..., ffn]. By "torch" or "triton"."""
    return _gated(gate_up, "silu", by)


def geglu(gate_up: torch.Tensor, *, by: str = "torch") -> torch.Tensor:
    """gelu(gate) up with the tanh GELU: [..., 2 ffn], gate first -> [..., ffn]. By "torch" or "triton"."""
    return _gated(gate_up, "gelu", by)


def _gated(gate_up: torch.Tensor, activation: str, by: str) -> torch.Tensor:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up are halves of the last dim, which is {gate_up.shape[-1]}")
    if _triton(by):
        return _glu(gate_up, activation)
    return _GLU.apply(gate_up, activation)  # type: ignore[no-any-return]


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, *, by: str = "torch") -> torch.Tensor:
    """The tanh GELU of x + bias, x [..., width], bias [width] or none. By "torch" or "triton"."""
    if _triton(by):
        return _bias_gelu(x, bias)
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def gelu(x: torch.Tensor, *, by: str = "torch") -> torch.Tensor:
    """GPT-2's tanh GELU, [..., ffn] -> [..., ffn]. By "torch" or "triton"."""
    return bias_gelu(x, None, by=by)


def _triton(by: str) -> bool:
    if by not in ("torch", "triton"):
        raise ValueError(f"by is {by!r}, there are 'torch' and 'triton'")
    return by == "triton"
