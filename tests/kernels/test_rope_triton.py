"""RoPE by Triton: against float64, in any layout, under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from engine.kernels.rope import rope_backward_launch, rope_launch, rope_split, rope_table
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal

pytestmark = needs_triton
Split = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
SHAPES = [(2, 5, 3, 1, 32), (1, 7, 2, 2, 80), (3, 2, 5, 3, 96), (1, 2, 33, 1, 64), (1, 2, 9, 4, 256), (1, 1, 1, 1, 2)]
"""batch, seq, heads, kv_heads, head_dim; tables whose half is no power of two, more heads than a tile has."""


def table(seq: int, head_dim: int, scaling: float = 1.0) -> tuple[torch.Tensor, ...]:
    """cos and sin of some positions, scaled."""
    positions = torch.arange(5, 5 + 3 * seq, 3, device=DEVICE)
    return tuple(x * scaling for x in rope_table(positions, head_dim, 1e4, torch.float32))


def plain(cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int) -> Split:
    """The formula in torch; as precise as the dtype allows: rounded once."""
    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x[:, :, : heads + kv_heads].chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        turned = torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
        q, k = turned.transpose(1, 2).split([heads, kv_heads], 1)
        return q, k, x[:, :, heads + kv_heads :].transpose(1, 2)

    return split


def ours(cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int) -> Split:
    """By Triton, on a copy: a leaf must not be changed."""
    return lambda x: rope_split(x.clone(), cos, sin, heads, kv_heads, by="triton")


def spread(y: torch.Tensor, number: int) -> torch.Tensor:
    """Gradients as other kernels lay them out: q's transposed, k's expanded over the batch, v's a slice."""
    grad = normal(*y.shape, seed=90 + number).to(y.dtype)
    if number == 0:
        return grad.transpose(1, 2).contiguous().transpose(1, 2)
    return grad[:1].expand(y.shape) if number == 1 else torch.cat([grad, grad], 3)[..., : y.shape[3]]


@crossed(shape=SHAPES, dtype=FLOATS)
def test_q_and_k_are_turned_and_v_is_left(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, seq, heads, kv_heads, head_dim = shape
    options = *table(seq, head_dim), heads, kv_heads
    x = normal(batch, seq, heads + 2 * kv_heads, head_dim)
    assert_as_good(ours(*options), plain(*options), [x], dtype)
    assert_as_good(ours(*options), plain(*options), [x], dtype, spread)
    assert torch.equal(ours(*options)(x.to(dtype))[2], x.to(dtype)[:, :, heads + kv_heads :].transpose(1, 2))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_table_that_is_not_of_unit_length(dtype: torch.dtype) -> None:
    options = *table(3, 32, scaling=1.7), 4, 2
    assert_as_good(ours(*options), plain(*options), [normal(2, 3, 8, 32, scale=30.0)], dtype)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice of heads": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "head_dim not last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd offset": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_turned_in_its_own_memory(layout: str) -> None:
    options = *table(5, 32), 3, 2
    x = LAYOUTS[layout](normal(2, 5, 7, 32).bfloat16())
    wanted = plain(*options)(x)
    address = x.data_ptr()
    found = rope_split(x, *options, by="triton")
    assert found[0].data_ptr() == address
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_results_that_are_not_used_have_no_gradient(used: tuple[int, ...]) -> None:
    options = *table(3, 16), 2, 1
    grads = []
    for split in (ours(*options), plain(*options)):
        x = normal(2, 3, 4, 16).float().requires_grad_()
        parts = split(x)
        torch.cat([parts[i] * (i + 1) for i in used], 1).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_a_gradient_of_a_sum_which_has_no_strides() -> None:
    options = *table(3, 16), 2, 1
    grads = []
    for split in (ours(*options), plain(*options)):
        x = normal(2, 3, 4, 16).float().requires_grad_()
        sum(part.sum() for part in split(x)).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_triton_agrees_with_the_reference() -> None:
    options = *table(4, 64), 4, 2
    x = normal(2, 4, 8, 64).bfloat16()
    for mine, theirs in zip(ours(*options)(x), rope_split(x.clone(), *options), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_nothing_at_all() -> None:
    for batch, seq in ((0, 3), (2, 0)):
        x = torch.zeros(batch, seq, 4, 16, device=DEVICE, requires_grad=True)
        q, k, v = ours(*table(seq, 16), 2, 1)(x)
        (q.sum() + k.sum() + v.sum()).backward()
        assert q.shape == (batch, 2, seq, 16) and x.grad is not None and x.grad.shape == x.shape


def test_who_needs_the_values_that_were_turned_is_told() -> None:
    x = torch.ones(1, 2, 3, 4, device=DEVICE, requires_grad=True)
    kept = x.exp()  # its backward needs its result
    q, _, _ = rope_split(kept, *table(2, 4), 1, 1, by="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_another_word_for_by_is_refused() -> None:
    with pytest.raises(ValueError, match="by is 'cuda'"):
        rope_split(torch.zeros(1, 1, 3, 4), torch.ones(1, 2), torch.ones(1, 2), 1, 1, by="cuda")


def test_a_table_of_too_few_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cos is \(2, 2\).*which is \(3, 2\)"):
        ours(*table(2, 4), 1, 1)(torch.zeros(1, 3, 3, 4, device=DEVICE))


@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    assert_repeats(ours(*table(5, 80), 3, 1), [normal(2, 5, 5, 80)], dtype)


def test_offsets_beyond_two_to_the_31() -> None:
    far = 2**31 + 64  # pages that are not touched take no memory
    cos, sin = table(2, 16)
    memory = torch.empty(far + 1024, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((2, 2, 3, 16), (far, 48, 16, 1)).copy_(normal(2, 2, 3, 16))
    wanted = plain(cos, sin, 1, 1)(x.clone())
    rope_launch(x, cos, sin, 2)
    q, k, v = x.transpose(1, 2).split(1, 1)
    for mine, true in zip((q, k, v), wanted, strict=True):
        torch.testing.assert_close(mine, true)
    whole = rope_backward_launch(q, k, v, cos, sin)
    torch.testing.assert_close(whole, rope_backward_launch(*(g.contiguous() for g in (q, k, v)), cos, sin))


def test_operators_are_what_their_schemas_say() -> None:
    cos, sin = table(3, 8)
    x = normal(2, 3, 4, 8).float()
    torch.library.opcheck(torch.ops.triax.rope_.default, (x, cos, sin, 3))
    q, k, v = x.transpose(1, 2).split([2, 1, 1], 1)
    torch.library.opcheck(torch.ops.triax.rope_backward.default, (q, k, v, cos, sin))


def attend(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A projection, RoPE and attention as a model has them: 2 heads, 1 kv head of 16."""
    qkv = (x @ weight).view(*x.shape[:2], 4, 16)
    q, k, v = rope_split(qkv, cos, sin, 2, 1, by="triton")
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def test_compiled_it_is_one_graph_with_one_gradient_written_once() -> None:
    graphs: dict[str, list[str]] = {}

    def backend(name: str) -> Any:
        def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            graphs[name] = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return keep

    compiled = torch.compile(attend, fullgraph=True,
                             backend=aot_autograd(fw_compiler=backend("forward"), bw_compiler=backend("backward")))
    cos, sin = table(5, 16)
    results = []
    for function in (attend, compiled, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        x, weight = normal(2, 5, 8).float().requires_grad_(), normal(8, 64, seed=1).float().requires_grad_()
        y = function(x, weight, cos, sin)
        (y * normal(*y.shape, seed=2)).sum().backward()
        results.append((y.detach(), x.grad, weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert sum("rope_backward" in name for name in graphs["backward"]) == 1
    assert not any(word in name for name in graphs["backward"] for word in ("cat", "copy", "scatter", "select"))


def test_compiled_alone_on_memory_it_was_given() -> None:
    cos, sin = table(5, 16)
    function = torch.compile(lambda x: rope_split(x, cos, sin, 2, 1, by="triton"), fullgraph=True, backend="aot_eager")
    base = normal(2, 5, 4, 16).float()
    for grad in (False, True):
        mine, true = (base.clone().requires_grad_(grad) for _ in range(2))
        found = function(mine * 1)
        wanted = plain(cos, sin, 2, 1)(true)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        if grad:
            sum(part.square().sum() for part in found).backward()
            sum(part.square().sum() for part in wanted).backward()
            torch.testing.assert_close(mine.grad, true.grad)
