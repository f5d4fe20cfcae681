"""SwiGLU, GEGLU and bias+GELU by Triton: against float64, in any layout, under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.activation import (
    bias_gelu,
    bias_gelu_backward_launch,
    bias_gelu_launch,
    geglu,
    gelu,
    glu_backward_launch,
    glu_launch,
    swiglu,
)
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal

# The interpreter computes by numpy, which says what a GPU does not: that 2^t is infinite where the result is 0.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:overflow encountered in exp2")]
Gated = Callable[[torch.Tensor], torch.Tensor]
SHAPES = [(3, 5, 34), (7, 2), (1, 1, 2), (2, 2050), (5, 6000)]
"""[..., 2 ffn]: of one element, just over a block, several blocks with a part of one."""
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "columns from an odd one": lambda x: torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1],
    "rows transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def plain_geglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return plain_gelu(gate) * up


def plain_gelu(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float64:
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


GATED: list[tuple[Gated, Gated]] = [(lambda x: swiglu(x, by="triton"), plain_swiglu),
                                    (lambda x: geglu(x, by="triton"), plain_geglu)]
NAMES = ["swiglu", "geglu"]


def ours_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return bias_gelu(x, bias, by="triton")


def plain_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return plain_gelu(x + bias)


def odd_layouts(y: torch.Tensor, number: int) -> torch.Tensor:
    """Gradients that are not plain: transposed where there are dims to do so, expanded over the first dim."""
    grad = normal(*y.shape, seed=9).to(y.dtype)
    return grad.transpose(0, 1).contiguous().transpose(0, 1) if y.ndim > 2 else grad[:1].expand(y.shape)


@crossed(shape=SHAPES, dtype=FLOATS)
@pytest.mark.parametrize(("ours", "plain"), GATED, ids=NAMES)
def test_gated_units(ours: Gated, plain: Gated, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_good(ours, plain, [normal(*shape)], dtype)
    assert_as_good(ours, plain, [normal(*shape, scale=8.0)], dtype, odd_layouts)


@crossed(width=[1, 17, 1300], dtype=FLOATS)
def test_bias_and_gelu(width: int, dtype: torch.dtype) -> None:
    for shape, scale, grads in (((3, 5, width), 1.0, odd_layouts), ((1, width), 8.0, None)):
        inputs = [normal(*shape, scale=scale), normal(width, seed=1)]
        assert_as_good(ours_bias, plain_bias, inputs, dtype, grads)
        assert_as_good(lambda x: bias_gelu(x, None, by="triton"), plain_gelu, inputs[:1], dtype, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ours", "plain"), GATED, ids=NAMES)
def test_gated_units_of_any_layout(ours: Gated, plain: Gated, layout: str) -> None:
    assert_as_good(ours, plain, [LAYOUTS[layout](normal(3, 4, 26))], torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_and_gelu_of_any_layout(layout: str) -> None:
    assert_as_good(ours_bias, plain_bias, [LAYOUTS[layout](normal(3, 4, 13)), normal(26, seed=1)[::2]], torch.bfloat16)


def test_the_gradient_of_a_bias_in_many_rows_is_summed_in_fp32() -> None:
    x, bias = normal(300, 8), normal(8, seed=1)
    found = []
    for dtype, function in ((torch.float64, plain_bias), (torch.bfloat16, ours_bias)):
        leaf = bias.to(dtype).detach().requires_grad_()
        function(x.to(dtype), leaf).backward((normal(300, 8, seed=5) + 1).bfloat16().to(dtype))
        assert leaf.grad is not None
        found.append(leaf.grad.double())
    assert float((found[1] - found[0]).abs().max()) <= 2**-8 * float(found[0].abs().max())


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_and_what_is_beyond_the_exponential_s_range(dtype: torch.dtype) -> None:
    edge = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e3, -1e3, 3e4, -3e4], dtype=dtype, device=DEVICE)
    x = torch.cat([edge, torch.ones_like(edge)])
    for ours, reference in ((lambda x: swiglu(x, by="triton"), swiglu), (lambda x: geglu(x, by="triton"), geglu),
                            (lambda x: gelu(x, by="triton"), gelu)):
        results = []
        for function in (ours, reference):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.sum().backward()
            results.append((y.detach(), leaf.grad))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-30)


def test_triton_agrees_with_the_reference() -> None:
    x, bias = normal(3, 40).float(), normal(40, seed=1).float()
    for one, other in ((swiglu(x, by="triton"), swiglu(x)), (geglu(x, by="triton"), geglu(x)),
                       (bias_gelu(x, bias, by="triton"), bias_gelu(x, bias)), (gelu(x, by="triton"), gelu(x))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_references_that_are_new(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float64:
        x = normal(3, 34, scale=scale).requires_grad_()
        assert torch.autograd.gradcheck(geglu, (x,))
        return
    assert_as_good(geglu, plain_geglu, [normal(3, 34, scale=scale)], dtype)
    assert_as_good(lambda x, bias: bias_gelu(x, bias), plain_bias, [normal(3, 5, scale=scale), normal(5)], dtype)


def test_nothing_at_all() -> None:
    for shape in ((0, 8), (2, 0)):
        x = torch.zeros(*shape, device=DEVICE, requires_grad=True)
        bias = torch.zeros(shape[1], device=DEVICE, requires_grad=True)
        (swiglu(x, by="triton").sum() + geglu(x, by="triton").sum() + ours_bias(x, bias).sum()).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert bias.grad is not None and torch.equal(bias.grad, torch.zeros_like(bias))


def test_what_cannot_be_is_refused() -> None:
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="halves of the last dim, which is 5"):
        swiglu(x)
    with pytest.raises(ValueError, match=r"bias is \(4,\), \(5,\) is needed"):
        ours_bias(x, torch.zeros(4))
    with pytest.raises(ValueError, match="by is 'cuda'"):
        gelu(x, by="cuda")


@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    for ours, _ in GATED:
        assert_repeats(ours, [normal(5, 30)], dtype)
    assert_repeats(ours_bias, [normal(40, 30), normal(30, seed=1)], dtype)


def test_offsets_beyond_two_to_the_31() -> None:
    far = 2**31 + 64  # pages that are not touched take no memory
    memory = torch.empty(far + 1024, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((2, 32), (far, 1)).copy_(normal(2, 32))
    grad = memory.as_strided((2, 16), (far, 1), 64).copy_(normal(2, 16, seed=1))
    wide_grad = memory.as_strided((2, 32), (far, 1), 128).copy_(normal(2, 32, seed=2))
    bias = normal(32, seed=3).bfloat16()
    near, near_grad, near_wide = x.contiguous(), grad.contiguous(), wide_grad.contiguous()
    pairs = [(glu_launch(x, "silu"), glu_launch(near, "silu")),
             (bias_gelu_launch(x, bias), bias_gelu_launch(near, bias)),
             (glu_backward_launch(grad, x, "gelu"), glu_backward_launch(near_grad, near, "gelu")),
             *zip(bias_gelu_backward_launch(wide_grad, x, bias), bias_gelu_backward_launch(near_wide, near, bias),
                  strict=True)]
    for mine, true in pairs:
        assert torch.equal(mine, true)


def test_operators_are_what_their_schemas_say() -> None:
    x, grad = normal(3, 8).float().requires_grad_(), normal(3, 4, seed=1).float()
    wide_grad, bias = normal(3, 8, seed=1).float(), normal(8, seed=2).float().requires_grad_()
    ops = torch.ops.triax
    torch.library.opcheck(ops.glu.default, (x, "silu"))
    torch.library.opcheck(ops.glu_backward.default, (grad, x.detach(), "gelu"))
    for added in (bias, None):
        torch.library.opcheck(ops.bias_gelu.default, (x, added))
        torch.library.opcheck(ops.bias_gelu_backward.default,
                              (wide_grad, x.detach(), None if added is None else added.detach()))


def test_compiled_it_is_one_graph_with_the_same_results() -> None:
    def layer(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = bias_gelu(x * 2, bias, by="triton")
        return swiglu(y, by="triton") + geglu(y, by="triton") + gelu(x[..., ::2], by="triton")

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x, bias = normal(2, 5, 12).float().requires_grad_(), normal(12, seed=1).float().requires_grad_()
        y = function(x, bias)
        y.backward(normal(*y.shape, seed=2).float())
        results.append((y.detach(), x.grad, bias.grad))
    for mine, true in zip(*results, strict=True):
        assert torch.equal(mine, true)
