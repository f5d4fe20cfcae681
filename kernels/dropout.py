"""Bias, dropout and residual in one pass: y = residual + mask (x + bias) / (1 - p), its mask drawn from a counter.

Element i of x, counted row by row, is number n = offset + i of the stream of `seed`. It is dropped where word n % 4 of
Philox-4x32-10 (Salmon et al., SC 2011) is below p 2^32; the key is the seed's low and high half, the counter is the low
and high half of n // 4, then 0, 0. Nothing else enters, neither grid nor device nor layout of ranks: a rank that holds
part of a tensor passes the number of its first element in the whole, and draws the mask that one rank would draw there.

Limits: a call sees one contiguous run of the whole tensor in row-major order. A rank with some rows of every sequence
of a batch ([batch, seq / tp, hidden]) makes a call for each sequence, or keeps the sequence in front. offset + i stays
below 2^63. Tensors that must not share a mask differ in seed (hash layer, step and place into it) or in offset.

Backward, the mask drawn again and never stored: d_residual = g;  d_x = mask g / (1 - p);  d_bias = column sums of d_x,
in fp32 and always in one order.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.activation import as_rows, check_bias, row_tile
from engine.kernels.language import cdiv, jit, jit_counting, processors, rounded, tl, wide

WORDS = 4
"""Numbers Philox-4x32 makes from one value of its counter."""
LOW = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
"""What the two keys grow by from round to round."""


# The reference, in torch.


def philox(seed: int, counters: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10: the four words of each of the counters [n] int64, as [n, 4] int64.

    The products wrap modulo 2^64 where int64 ends, so both their halves are right, whatever the sign says.
    """
    words = [counters & LOW, counters >> 32 & LOW, torch.zeros_like(counters), torch.zeros_like(counters)]
    keys = [seed & LOW, seed >> 32 & LOW]
    for _ in range(ROUNDS):
        even, odd = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [odd >> 32 & LOW ^ words[1] ^ keys[0], odd & LOW, even >> 32 & LOW ^ words[3] ^ keys[1], even & LOW]
        keys = [keys[0] + WEYL[0] & LOW, keys[1] + WEYL[1] & LOW]
    return torch.stack(words, 1)


def below(p: float) -> int:
    """Words below this are dropped."""
    return min(round(p * 2**32), LOW)


def dropout_mask(shape: torch.Size, p: float, seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """True where an element is kept: bit for bit the mask that the kernels draw."""
    skipped = offset % WORDS
    counters = torch.arange(cdiv(skipped + shape.numel(), WORDS), device=device) + offset // WORDS
    words = philox(seed, counters).view(-1)[skipped : skipped + shape.numel()]
    return (words >= below(p)).view(shape)


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int,
                offset: int) -> torch.Tensor:
        ctx.options = p, seed, offset
        ctx.kinds = x.dtype, None if bias is None else bias.dtype
        kind = wide(x.dtype)
        y = x.to(kind) if bias is None else x.to(kind) + bias.to(kind)
        if p > 0:
            y = (y / (1 - p)).where(dropout_mask(x.shape, p, seed, offset, x.device), 0)
        return (y + residual.to(kind)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        p, seed, offset = ctx.options
        kind, bias_kind = ctx.kinds
        g = grad.to(wide(kind))
        if p > 0:
            g = (g / (1 - p)).where(dropout_mask(g.shape, p, seed, offset, g.device), 0)
        grad_bias = None if bias_kind is None else g.sum(list(range(g.ndim - 1))).to(bias_kind)
        return g.to(kind), grad_bias, grad, None, None, None


# The kernels.

_ROUNDS = tl.constexpr(ROUNDS)
_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])


@jit
def _philox(seed, counter):
    """The four words (uint32) of a counter (int64).

    As triton.language.randint4x, but each product is one widening multiplication where that takes one for each half:
    the random numbers cost a pass at memory's pace a good part of its instructions.
    """
    a = counter.to(tl.uint32)
    b = (counter >> 32).to(tl.uint32)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    low = tl.cast(seed, tl.uint32)
    high = tl.cast(tl.cast(seed, tl.int64) >> 32, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        even = a.to(tl.uint64) * _M0
        odd = c.to(tl.uint64) * _M1
        a = (odd >> 32).to(tl.uint32) ^ b ^ low
        b = odd.to(tl.uint32)
        c = (even >> 32).to(tl.uint32) ^ d ^ high
        d = even.to(tl.uint32)
        low += _W0
        high += _W1
    return a, b, c, d


@jit
def _kept(row, cols, seed, offset, threshold, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether elements (row int64, cols) are kept.

    Each asks for the words of its own counter. Where rows begin with a counter's first word (ALIGNED), the compiler
    sees that four neighbours, which one thread holds, ask for the same, and draws them once. Put together from the four
    words, the mask would be moved between threads.
    """
    if ALIGNED:
        counter = (tl.cast(offset, tl.int64) >> 2) + row * (WIDTH // 4) + (cols >> 2)
        word = cols & 3
    else:
        number = tl.cast(offset, tl.int64) + row * WIDTH + cols
        counter = number >> 2
        word = number & 3
    a, b, c, d = _philox(seed, counter)
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)) >= threshold


@jit_counting("rows", "seed", "offset", "threshold")
def _bias_dropout_kernel(x, bias, residual, y, rows, stride_x, stride_residual, seed: tl.int64, offset: tl.int64,
                         threshold: tl.uint32, scale, WIDTH: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
                         ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of y; its rows share what is read of the bias."""
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (cols < WIDTH)
    value = tl.load(x + row * stride_x + cols, mask=mask, other=0).to(tl.float32)
    rest = tl.load(residual + row * stride_residual + cols, mask=mask, other=0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + cols, mask=cols < WIDTH, other=0).to(tl.float32)
    if DROP:
        kept = _kept(row, cols, seed, offset, threshold, WIDTH, ALIGNED)
        rest += tl.where(kept, value, 0.0) * scale
    else:
        rest += value
    tl.store(y + row * WIDTH + cols, rounded(rest, y.dtype.element_ty), mask=mask)


@jit_counting("rows", "seed", "offset", "threshold")
def _bias_dropout_backward_kernel(grad, grad_x, partial, rows, stride_row, seed: tl.int64, offset: tl.int64,
                                  threshold: tl.uint32, scale, WIDTH: tl.constexpr, BIAS: tl.constexpr,
                                  ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every so many rows of a block of columns: d_x, and their sum, one row of `partial` [programs, WIDTH]."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = cols < WIDTH
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.program_id(1) * BLOCK_M, rows, tl.num_programs(1) * BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (row < rows) & inside
        g = tl.load(grad + row * stride_row + cols, mask=mask, other=0).to(tl.float32)
        kept = _kept(row, cols, seed, offset, threshold, WIDTH, ALIGNED)
        product = tl.where(kept, g, 0.0) * scale
        tl.store(grad_x + row * WIDTH + cols, rounded(product, grad_x.dtype.element_ty), mask=mask)
        total += product
    if BIAS:
        sums = partial + tl.program_id(1).to(tl.int64) * WIDTH + cols
        tl.store(sums, tl.sum(total, 0)[None, :], mask=inside)


# The launchers.


# Rows of a program. Forward, two rows by 4 warps: the bias is read half as often, and 46 registers a thread let 10
# blocks on a multiprocessor; where neighbours share no counter a row fills the registers. Backward, four rows by 16
# warps, whose sums meet in shared memory: partial sums of each 4 warps would be 6 % of the traffic.
FORWARD_M, FORWARD_M_UNALIGNED = 2, 1
BACKWARD_M, BACKWARD_WARPS = 4, 4
# Programs a multiprocessor has backward, as 40 registers a thread let in: one wave, however many rows there are.
BACKWARD_PROGRAMS = 3


def _options(width: int, dtype: torch.dtype, p: float, seed: int, offset: int) -> dict[str, Any]:
    """What both kernels take: the random numbers' part, and a block of a row, in which a thread holds all elements of a
    counter (4 elements of fp32, 8 of others)."""
    return {"seed": seed, "offset": offset, "threshold": below(p), "scale": 1 / (1 - p), "WIDTH": width,
            "ALIGNED": width % WORDS == 0 and offset % WORDS == 0, **row_tile(width, dtype)}


def bias_dropout_add_launch(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int,
                            offset: int) -> torch.Tensor:
    """residual + dropout(x + bias), [..., width]."""
    width = x.shape[-1]
    check_bias(bias, width)
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    flat, rest = as_rows(x), as_rows(residual)
    options = _options(width, x.dtype, p, seed, offset)
    rows = FORWARD_M if options["ALIGNED"] else FORWARD_M_UNALIGNED
    _bias_dropout_kernel[(cdiv(len(flat), rows) * cdiv(width, options["BLOCK_N"]),)](
        flat, x if bias is None else bias.contiguous(), rest, y, len(flat), flat.stride(0), rest.stride(0),
        BIAS=bias is not None, DROP=p > 0, BLOCK_M=rows, **options)
    return y


def bias_dropout_backward_launch(grad: torch.Tensor, p: float, seed: int, offset: int,
                                 sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x and, with `sums`, that of the bias in fp32 (else of no elements), from that of the result."""
    width = grad.shape[-1]
    grad_x = grad.new_empty(grad.shape)
    if grad_x.numel() == 0:
        return grad_x, grad.new_zeros(width if sums else 0, dtype=torch.float32)
    flat = as_rows(grad)
    options = _options(width, grad.dtype, p, seed, offset)
    columns = cdiv(width, options["BLOCK_N"])
    chunks = min(cdiv(BACKWARD_PROGRAMS * processors(grad.device), columns), cdiv(len(flat), BACKWARD_M))
    partial = grad.new_empty(chunks if sums else 0, width, dtype=torch.float32)
    options["num_warps"] *= BACKWARD_WARPS
    _bias_dropout_backward_kernel[(columns, chunks)](flat, grad_x, partial, len(flat), flat.stride(0), BIAS=sums,
                                                     BLOCK_M=BACKWARD_M, **options)
    return grad_x, partial.sum(0) if sums else grad.new_empty(0, dtype=torch.float32)


# The launchers as operators of torch.


@torch.library.custom_op("triax::bias_dropout_add", mutates_args=())
def _bias_dropout_add(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int,
                      offset: int) -> torch.Tensor:
    return bias_dropout_add_launch(x, bias, residual, p, seed, offset)


@_bias_dropout_add.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int,
      offset: int) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triax::bias_dropout_backward", mutates_args=())
def _bias_dropout_backward(grad: torch.Tensor, p: float, seed: int, offset: int,
                           sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return bias_dropout_backward_launch(grad, p, seed, offset, sums)


@_bias_dropout_backward.register_fake
def _(grad: torch.Tensor, p: float, seed: int, offset: int, sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[-1] if sums else 0, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, bias, _, *options = inputs
    ctx.options = options
    ctx.bias_kind = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    sums = ctx.bias_kind is not None and ctx.needs_input_grad[1]
    if ctx.options[0] > 0 and (sums or ctx.needs_input_grad[0]):
        grad_x, grad_bias = _bias_dropout_backward(grad, *ctx.options, sums)
    else:  # nothing was dropped: the gradient of x is that of the result
        grad_x, grad_bias = grad, grad.sum(list(range(grad.ndim - 1)), dtype=torch.float32) if sums else grad
    return grad_x, grad_bias.to(ctx.bias_kind) if sums else None, grad, None, None, None


_bias_dropout_add.register_autograd(_gradients, setup_context=_keep)


# What models call.


def bias_dropout_add(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, *, p: float, seed: int,
                     offset: int = 0, training: bool = True, by: str = "torch") -> torch.Tensor:
    """residual + dropout(x + bias): x and residual [..., width] of one dtype, bias [width] or none. Of what is dropped,
    a share p (0 <= p < 1; none unless `training`), the rest is divided by 1 - p.

    Which elements: see above; seed is in [0, 2^63), offset the number of x's first element. By "torch" or "triton".
    """
    if by not in ("torch", "triton"):
        raise ValueError(f"bias_dropout_add: by is {by!r}, there are 'torch' and 'triton'")
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"bias_dropout_add: x is {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} "
                         f"{residual.dtype}; they must be alike")
    if not 0 <= p < 1:
        raise ValueError(f"bias_dropout_add: p is {p}, a share in [0, 1) is needed")
    if not (0 <= seed < 2**63 and 0 <= offset < 2**63 - x.numel()):
        raise ValueError(f"bias_dropout_add: seed {seed} and offset {offset} (and what it counts) are in [0, 2^63)")
    p = p if training else 0.0
    if by == "triton":
        return _bias_dropout_add(x, bias, residual, p, seed, offset)
    return _BiasDropoutAdd.apply(x, bias, residual, p, seed, offset)  # type: ignore[no-any-return]
