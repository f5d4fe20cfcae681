"""RMSNorm and LayerNorm by Triton: against float64, in any layout, with and without a residual addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.kernels import norm
from engine.kernels.language import wide
from engine.kernels.norm import add_layer_norm, add_rms_norm, apex_norm, layer_norm, rms_norm
from engine.kernels.norm.backward import backward
from engine.kernels.norm.forward import forward
from engine.kernels.norm.rows import addressed
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal, run

pytestmark = needs_triton
EPS = 1e-5
NORMS = {"rms": rms_norm, "layer": layer_norm, "add_rms": add_rms_norm, "add_layer": add_layer_norm}
SHAPES = [(1, 1), (4, 3, 1), (2, 5, 7), (600, 16), (70, 65), (9, 1000), (5, 4100), (3, 8200), (2, 17000)]
"""Rows of one element; tiles of many rows, and more tiles than programs; one row a tile; rows split by columns."""


def plain(kind: str) -> Callable[..., Any]:
    """The formula in torch, differentiated by autograd, rounded where a model without fusion rounds."""
    def formula(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        branch, parameters = (rest[:1], rest[1:]) if kind.startswith("add") else ((), rest)
        total = x + branch[0] if branch else x
        value, weight, *bias = (t.to(wide(t.dtype)) for t in (total, *parameters))
        if bias:
            value = value - value.mean(-1, keepdim=True)
        y = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + EPS) * weight
        y = (y + bias[0] if bias else y).to(x.dtype)
        return (y, total) if branch else y

    return formula


def ours(kind: str, by: str = "triton") -> Callable[..., Any]:
    return lambda *tensors: NORMS[kind](*tensors, EPS, by=by)


def inputs(kind: str, *shape: int, scale: float = 1.0) -> list[torch.Tensor]:
    """x, the branch, weight and bias, as far as a norm has them."""
    width = shape[-1]
    return [normal(*shape, scale=scale), *([normal(*shape, seed=1, scale=scale)] if kind.startswith("add") else []),
            normal(width, seed=2), *([normal(width, seed=3)] if kind.endswith("layer") else [])]


def narrowed(function: Callable[..., Any], view: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The function of a view of each input but weight and bias, so that gradients reach the whole."""
    return lambda *tensors: function(*(view(t) if t.dim() > 1 else t for t in tensors))


@crossed(shape=SHAPES, dtype=FLOATS)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_as_near_to_float64_as_torch(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_good(ours(kind), plain(kind), inputs(kind, *shape), dtype)


@crossed(scale=[1e-3, 1e4], dtype=FLOATS)
@pytest.mark.parametrize("kind", NORMS)
def test_small_and_large_rows_beside_a_row_of_zeros(kind: str, scale: float, dtype: torch.dtype) -> None:
    tensors = inputs(kind, 5, 96, scale=scale)
    for x in tensors:
        if x.dim() == 2:
            x[2] = 0
    assert_as_good(ours(kind), plain(kind), tensors, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_of_rows_far_from_zero(dtype: torch.dtype) -> None:
    x = (normal(6, 300) + 10).bfloat16().double()
    assert_as_good(ours("layer"), plain("layer"), [x, *inputs("layer", 300)[1:]], dtype)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads sliced from a wider tensor": lambda x: x[:, :, 1:4],
    "batch and seq swapped": lambda x: x.transpose(0, 1),
    "three strides, copied": lambda x: x.transpose(0, 1)[:, :, 1:3],
    "columns sliced": lambda x: x[..., 3:40],
    "columns apart, copied": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1, :, :1].expand(3, -1, 4, -1),
    "one token of each sequence": lambda x: x[:, 2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", NORMS)
def test_layouts_of_inputs(kind: str, view: str) -> None:
    x = normal(2, 3, 5, 48)
    width = VIEWS[view](x).shape[-1]
    tensors = [t if t.dim() == 1 else x + i for i, t in enumerate(inputs(kind, 1, width))]
    assert_as_good(narrowed(ours(kind), VIEWS[view]), narrowed(plain(kind), VIEWS[view]), tensors, torch.bfloat16)


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one number": lambda g: g.flatten()[0].expand(g.shape),
    "one row": lambda g: g[:1, :1].expand(g.shape),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "columns apart": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("kind", NORMS)
def test_layouts_of_gradients(kind: str, layout: str) -> None:
    def grads(y: torch.Tensor, number: int) -> torch.Tensor:
        return GRADIENTS[layout](normal(*y.shape, seed=90 + number).to(y.dtype))

    assert_as_good(ours(kind), plain(kind), inputs(kind, 4, 6, 40), torch.bfloat16, grads)


def test_gradients_that_come_are_not_written_to() -> None:
    for kind in NORMS:
        leaves = [t.float().requires_grad_() for t in inputs(kind, 4, 6, 40)]
        found = ours(kind)(*leaves)
        results = found if isinstance(found, tuple) else (found,)
        grads = [torch.ones_like(y) for y in results]
        torch.autograd.backward(results, grads)
        assert all((grad == 1).all() for grad in grads)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("kind", ["add_rms", "add_layer"])
def test_one_of_two_results_may_go_unused(kind: str, used: int) -> None:
    assert_as_good(lambda *t: ours(kind)(*t)[used], lambda *t: plain(kind)(*t)[used], inputs(kind, 5, 40),
                   torch.bfloat16)


def test_x_may_be_its_own_branch() -> None:
    x, weight = inputs("rms", 5, 40)
    assert_as_good(lambda x, w: ours("add_rms")(x, x, w), lambda x, w: plain("add_rms")(x, x, w), [x, weight],
                   torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_total_is_the_sum_that_torch_rounds(dtype: torch.dtype) -> None:
    x, branch, weight, bias = (t.to(dtype) for t in inputs("add_layer", 7, 515, scale=3.0))
    for kind, parameters in (("add_rms", (weight,)), ("add_layer", (weight, bias))):
        y, total = ours(kind)(x, branch, *parameters)
        assert torch.equal(total, x + branch)
        assert torch.equal(y, ours(kind.removeprefix("add_"))(total, *parameters))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_by_torch_an_addition_and_a_norm_are_what_they_are_apart(kind: str, dtype: torch.dtype) -> None:
    def apart(x: torch.Tensor, branch: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + branch
        return NORMS[kind](total, *parameters, EPS), total

    tensors = inputs(f"add_{kind}", 5, 40)
    for one, other in zip(run(ours(f"add_{kind}", "torch"), tensors, dtype), run(apart, tensors, dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", NORMS)
def test_parameters_of_another_dtype_than_x(kind: str) -> None:
    def mixed(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: function(*(v.bfloat16() if v.dim() > 1 and v.dtype != torch.float64 else v for v in t))

    assert_as_good(mixed(ours(kind)), mixed(plain(kind)), inputs(kind, 30, 40), torch.float32)


@pytest.mark.parametrize("kind", NORMS)
def test_parameters_whose_elements_lie_apart(kind: str) -> None:
    def apart(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: function(*(v if v.dim() > 1 else torch.stack([v, v], 1)[:, 0] for v in t))

    assert_as_good(apart(ours(kind)), plain(kind), inputs(kind, 5, 40), torch.float32)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_rows(kind: str, shape: tuple[int, ...]) -> None:
    leaves = [t.float().requires_grad_() for t in inputs(kind, *shape)]
    found = ours(kind)(*leaves)
    for y in found if isinstance(found, tuple) else (found,):
        assert y.shape == shape
        y.sum().backward(retain_graph=True)
    assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(70, 65), (7, 4100), (3, 8200)], ids=str)
def test_bits_repeat(kind: str, shape: tuple[int, ...]) -> None:
    assert_repeats(ours(kind), inputs(kind, *shape), torch.bfloat16)


def test_heads_of_q_are_read_where_they_lie() -> None:
    qkv = torch.empty(2, 3, 8, 64)
    q, _, v = qkv.split([4, 2, 2], 2)
    group, found, strides = addressed(q, None, v.flatten(0, 1)[:, :1])
    assert group == 4 and found[0] is q and found[1] is None
    assert strides[0] == (8 * 64, 64) and strides[2] == (4 * 8 * 64, 8 * 64)


def test_offsets_beyond_31_bits() -> None:
    # Memory that is not written to takes no room: of the 4 GB here three rows are touched.
    stride = 2**30 + 16
    vast = torch.empty(4, stride // 2, dtype=torch.float32, device=DEVICE).view(torch.bfloat16).flatten()
    x, grad = (vast[at:].as_strided((3, 40), (stride, 1)) for at in (0, 64))
    small, small_grad = normal(3, 40).bfloat16(), normal(3, 40, seed=1).bfloat16()
    x.copy_(small)
    grad.copy_(small_grad)
    weight, bias = normal(40, seed=2).bfloat16(), normal(40, seed=3).bfloat16()
    for found, wanted in zip(forward(x, grad, weight, bias, EPS),
                             forward(small, small_grad, weight, bias, EPS), strict=True):
        assert torch.equal(found, wanted)
    _, _, mean, rstd = forward(small, None, weight, bias, EPS)
    for found, wanted in zip(backward(grad, x, x, weight, bias, mean, rstd),
                             backward(small_grad, small, small, weight, bias, mean, rstd), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", NORMS)
def test_the_ops_keep_the_rules_of_torch_library(kind: str) -> None:
    tensors = [t.float() for t in inputs(kind, 2, 3, 24)]
    branch = tensors.pop(1) if kind.startswith("add") else None
    x, weight, bias = *tensors, *([] if kind.endswith("layer") else [None])
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, branch, weight, bias)]
    torch.library.opcheck(norm._norm_op, (*leaves, EPS))
    _, total, mean, rstd = norm._norm_op(x, branch, weight, bias, EPS)
    grad_total = None if branch is None else torch.ones_like(x)
    torch.library.opcheck(norm._norm_backward_op, (x, grad_total, x if branch is None else total, weight, bias, mean,
                                                   rstd))


@pytest.mark.parametrize("kind", NORMS)
def test_compiled_whole_they_give_the_same_bits(kind: str) -> None:
    torch._dynamo.reset()

    def model(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = ours(kind)(*tensors)
        return tuple(y * 2 for y in found) if isinstance(found, tuple) else (found * 2,)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tensors = inputs(kind, 3, 5, 24)
    for one, other in zip(run(compiled, tensors, torch.bfloat16), run(model, tensors, torch.bfloat16), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["add_rms", "add_layer"])
def test_a_sum_made_before_has_the_bits_of_one_made_here(kind: str, dtype: torch.dtype) -> None:
    """Recomputation keeps the sum alone; in 16 bits, autograd's own addition of its gradients would round once more."""
    x, branch, *parameters = (t.to(dtype) for t in inputs(kind, 7, 300))
    total = x + branch
    found, wanted = [], []
    for results, tensors in ((wanted, (x, branch, *parameters)), (found, (total, None, *parameters))):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        outs = ours(kind)(*leaves)
        grads = [normal(7, 300, seed=seed).to(dtype) for seed in (5, 6)]
        torch.autograd.backward(outs, grads)
        results += [*outs, leaves[0].grad, *(leaf.grad for leaf in leaves[2:])]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="by is 'cuda'; there are 'torch', 'triton' and 'apex'"):
        rms_norm(x, weight, EPS, by="cuda")
    with pytest.raises(ValueError, match=r"must be like x: torch.float32 \[8\] is not torch.float32 \[2, 8\]"):
        add_rms_norm(x, weight, weight, EPS, by="triton")
    with pytest.raises(ValueError, match="up to 32768 columns, x has 32769"):
        rms_norm(torch.ones(1, 32769), torch.ones(32769), EPS, by="triton")


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_apex_is_used_or_refused(kind: str) -> None:
    tensors = [t.float() for t in inputs(kind, 4, 64)]
    if apex_norm(kind) is None:
        with pytest.raises(RuntimeError, match="NVIDIA Apex is not installed"):
            ours(kind, "apex")(*tensors)
    else:
        assert_as_good(ours(kind, "apex"), plain(kind), inputs(kind, 4, 64), torch.float32)
