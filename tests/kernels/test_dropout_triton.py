"""Bias, dropout and residual by Triton: the mask bit for bit, the rest against float64, under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.kernels.dropout import (
    below,
    bias_dropout_add,
    bias_dropout_add_launch,
    bias_dropout_backward_launch,
    dropout_mask,
    philox,
)
from engine.kernels.language import jit, tl
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal

pytestmark = needs_triton
Function = Callable[..., torch.Tensor]
SEED = 0x123456789ABCDEF
SHAPES = [(3, 5, 8), (7, 3), (1, 1), (5, 1030), (2, 3, 1100)]
"""Rows that are and are not whole counters; one element; a block and a part."""


def ours(p: float, offset: int = 0, by: str = "triton") -> Function:
    return lambda x, bias, residual: bias_dropout_add(x, bias, residual, p=p, seed=SEED, offset=offset, by=by)


def plain(p: float, offset: int = 0) -> Function:
    def formula(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        mask = dropout_mask(x.shape, p, SEED, offset, x.device) if p else torch.ones_like(x)
        return residual + (x + bias) * mask / (1 - p)

    return formula


def inputs(*shape: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [normal(*shape, scale=scale), normal(shape[-1], seed=1), normal(*shape, seed=2)]


def drawn(*shape: int, p: float = 0.5, seed: int = SEED, offset: int = 0) -> torch.Tensor:
    """The mask of the kernel, from what it does to ones."""
    ones = torch.ones(shape, device=DEVICE)
    return bias_dropout_add_launch(ones, None, torch.zeros_like(ones), p, seed, offset) != 0


@jit
def words_of_triton(counters, words, seed, BLOCK: tl.constexpr):
    """Triton's own Philox."""
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, tl.load(counters + i))
    tl.store(words + 4 * i, a.to(tl.int64))
    tl.store(words + 4 * i + 1, b.to(tl.int64))
    tl.store(words + 4 * i + 2, c.to(tl.int64))
    tl.store(words + 4 * i + 3, d.to(tl.int64))


def test_philox_gives_its_authors_numbers() -> None:
    # kat_vectors of Random123, philox4x32 with 10 rounds: counter 0, key 0.
    assert philox(0, torch.zeros(1, dtype=torch.int64)).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize("seed", [1, 2**31, SEED, 2**63 - 1])
def test_philox_gives_triton_s_numbers(seed: int) -> None:
    counters = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**61 - 1, 77], device=DEVICE)
    words = torch.empty(8, 4, dtype=torch.int64, device=DEVICE)
    words_of_triton[(1,)](counters, words, seed, BLOCK=8)
    assert torch.equal(philox(seed, counters), words)


@crossed(offset=[0, 4, 3, 2**34 - 8, 2**40 + 1], p=[0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(5, 8), (4, 7), (2, 1, 1030)], ids=str)
def test_the_mask_is_the_reference_s_bit_for_bit(shape: tuple[int, ...], offset: int, p: float) -> None:
    for seed in (SEED, 3, 2**63 - 1):
        wanted = dropout_mask(torch.Size(shape), p, seed, offset, DEVICE)
        assert torch.equal(drawn(*shape, p=p, seed=seed, offset=offset), wanted)
        grad, _ = bias_dropout_backward_launch(torch.ones(shape, device=DEVICE), p, seed, offset, False)
        assert torch.equal(grad != 0, wanted)


@pytest.mark.parametrize("width", [12, 7])
def test_every_split_of_rows_draws_the_mask_of_the_whole(width: int) -> None:
    whole = drawn(12, width, offset=20)
    for ranks in (2, 3, 4):
        rows = 12 // ranks
        parts = [drawn(rows, width, offset=20 + rank * rows * width) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drawn(3, 4, width, offset=20).flatten(0, 1), whole)


def test_the_share_that_is_dropped_is_p_and_seeds_differ() -> None:
    for p in (0.1, 0.5, 0.9):
        kept = dropout_mask(torch.Size([1 << 16]), p, SEED, 0, DEVICE).double()
        assert abs(float(kept.mean()) - (1 - p)) < 5 * (p * (1 - p) / len(kept)) ** 0.5
    assert below(0.5) == 2**31
    one, other = drawn(8, 1024), drawn(8, 1024, seed=SEED + 1)
    assert 0.45 < float((one == other).double().mean()) < 0.55


@pytest.mark.parametrize("p", [0.0, 0.3])
@crossed(shape=SHAPES, dtype=FLOATS)
def test_forward_and_backward(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    def odd(y: torch.Tensor, number: int) -> torch.Tensor:
        grad = normal(*y.shape, seed=9).to(y.dtype)
        return grad.transpose(0, 1).contiguous().transpose(0, 1) if y.ndim > 2 else grad[:1].expand(y.shape)

    assert_as_good(ours(p, 5), plain(p, 5), inputs(*shape), dtype, odd)
    assert_as_good(lambda x, r: ours(p)(x, None, r), lambda x, r: plain(p)(x, torch.zeros_like(x), r),
                   inputs(*shape, scale=300.0)[::2], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_reference(p: float, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        leaves = [x.requires_grad_() for x in inputs(3, 5)]
        assert torch.autograd.gradcheck(ours(p, by="torch"), leaves)
        return
    assert_as_good(ours(p, 3, by="torch"), plain(p, 3), inputs(2, 3, 10), dtype)
    x, bias, residual = (x.to(dtype) for x in inputs(4, 9))
    torch.testing.assert_close(ours(p)(x, bias, residual), ours(p, by="torch")(x, bias, residual))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "columns from an odd one": lambda x: torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1],
    "rows transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_follows_logical_order_in_any_layout(layout: str) -> None:
    x, bias, residual = inputs(3, 4, 12)
    assert_as_good(ours(0.5), plain(0.5), [LAYOUTS[layout](x), bias, residual], torch.bfloat16)
    assert_as_good(ours(0.5), plain(0.5), [x, normal(24)[::2], LAYOUTS[layout](residual)], torch.bfloat16)


def test_the_gradient_of_a_bias_in_many_rows_is_summed_in_fp32() -> None:
    grad = (normal(300, 8, seed=5) + 1).bfloat16()
    _, sums = bias_dropout_backward_launch(grad, 0.25, SEED, 0, True)
    mask = dropout_mask(grad.shape, 0.25, SEED, 0, DEVICE)
    torch.testing.assert_close(sums, (grad.double() * mask / 0.75).sum(0).float(), rtol=1e-6, atol=1e-6)


def test_without_training_or_p_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias, residual = (x.float() for x in inputs(3, 6))
    wanted = residual + (x + bias)
    # Numbers that are drawn would change the result: p is 1 to whoever draws.
    monkeypatch.setattr("engine.kernels.dropout.below", lambda p: 2**32 - 1)
    for options in ({"p": 0.0}, {"p": 0.5, "training": False}):
        for by in ("torch", "triton"):
            assert torch.equal(bias_dropout_add(x, bias, residual, seed=SEED, by=by, **options), wanted)


def test_gradients_that_nobody_wants_are_not_made() -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.float().requires_grad_(grad) for x, grad in zip(inputs(3, 6), wanted, strict=True)]
        ours(0.5)(*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == list(wanted)


def test_nothing_at_all() -> None:
    for shape in ((0, 8), (2, 0)):
        for p in (0.0, 0.5):
            x = torch.zeros(*shape, device=DEVICE, requires_grad=True)
            bias = torch.zeros(shape[1], device=DEVICE, requires_grad=True)
            ours(p)(x, bias, x * 1).sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape
            assert bias.grad is not None and torch.equal(bias.grad, torch.zeros_like(bias))
    assert dropout_mask(torch.Size([0]), 0.5, SEED, 3, DEVICE).shape == (0,)


@pytest.mark.parametrize(("changed", "message"), [
    ({"p": 1.0}, "p is 1.0"), ({"p": -0.1}, "p is -0.1"), ({"seed": -1}, "seed -1"), ({"seed": 2**63}, "seed"),
    ({"offset": 2**63 - 2}, "offset"), ({"by": "cuda"}, "by is 'cuda'")], ids=str)
def test_what_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        bias_dropout_add(x, None, x, **{"p": 0.1, "seed": 1, "by": "triton", **changed})


def test_tensors_that_are_not_alike_are_refused() -> None:
    for residual in (torch.zeros(2, 5), torch.zeros(2, 4).half()):
        with pytest.raises(ValueError, match="must be alike"):
            bias_dropout_add(torch.zeros(2, 4), None, residual, p=0.1, seed=1)


def test_runs_repeat_bit_by_bit() -> None:
    assert_repeats(ours(0.3), inputs(40, 30), torch.bfloat16)


def test_offsets_beyond_two_to_the_31() -> None:
    far = 2**31 + 64  # pages that are not touched take no memory
    memory = torch.empty(far + 1024, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((2, 32), (far, 1)).copy_(normal(2, 32))
    residual = memory.as_strided((2, 32), (far, 1), 64).copy_(normal(2, 32, seed=1))
    for p in (0.0, 0.5):
        assert torch.equal(bias_dropout_add_launch(x, None, residual, p, SEED, 0),
                           bias_dropout_add_launch(x.contiguous(), None, residual.contiguous(), p, SEED, 0))
    for mine, true in zip(bias_dropout_backward_launch(x, 0.5, SEED, 0, True),
                          bias_dropout_backward_launch(x.contiguous(), 0.5, SEED, 0, True), strict=True):
        assert torch.equal(mine, true)


def test_operators_are_what_their_schemas_say() -> None:
    x, bias, residual = (x.float().requires_grad_() for x in inputs(3, 8))
    for added, p in ((bias, 0.5), (None, 0.5), (bias, 0.0)):
        torch.library.opcheck(torch.ops.triax.bias_dropout_add.default, (x, added, residual, p, SEED, 4))
    torch.library.opcheck(torch.ops.triax.bias_dropout_backward.default, (x.detach(), 0.5, SEED, 4, True))


def test_compiled_it_is_one_graph_and_each_seed_has_its_mask() -> None:
    def layer(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, seed: int) -> torch.Tensor:
        y = bias_dropout_add(x * 2, bias, residual, p=0.5, seed=seed, offset=8, by="triton")
        return bias_dropout_add(y, None, residual, p=0.5, seed=seed, training=False, by="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (SEED, SEED + 1, SEED + 2):
        results = []
        for function in (layer, compiled):
            leaves = [x.float().requires_grad_() for x in inputs(2, 5, 12)]
            y = function(*leaves, seed)
            y.backward(normal(*y.shape, seed=2).float())
            results.append([y.detach(), *(x.grad for x in leaves)])
        for mine, true in zip(*results, strict=True):
            assert torch.equal(mine, true)
