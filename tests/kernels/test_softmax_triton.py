"""The scaled masked softmax, by torch and by Triton, against float64: masks, diagonals, layouts, long rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kernels import softmax
from engine.kernels.softmax import backward, forward, scaled_masked_softmax
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal

# The interpreter's numpy tells of infinities, which here are meant.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]
Mask = torch.Tensor | None


def formula(x: torch.Tensor, scale: float, mask: Mask = None, causal: bool = False) -> torch.Tensor:
    """In torch, step by step; rows that see nothing are 0."""
    seen = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(x.shape[-1] - x.shape[-2] if causal else
                                                                            x.shape[-1])
    seen = (seen if mask is None else seen & mask).expand(x.shape)
    y = (x * scale).masked_fill(~seen, float("-inf")).softmax(-1)
    return y.masked_fill(~seen.any(-1, keepdim=True), 0)


def hold(x: torch.Tensor, dtype: torch.dtype, scale: float = 0.3, mask: Mask = None, causal: bool = False,
         by: str = "triton", grads: Any = None) -> None:
    """The rule for these scores."""
    assert_as_good(lambda x: scaled_masked_softmax(x, scale, mask=mask, causal=causal, by=by),
                   lambda x: formula(x, scale, mask, causal), [x], dtype, grads)


def mask_of(*shape: int, share: float = 0.6) -> torch.Tensor:
    """A mask in which that share of the keys is seen."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) < share).to(DEVICE)


@pytest.mark.parametrize("by", ["torch", "triton"])
@crossed(shape=[(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 9, 64), (2, 1, 3, 1025)], dtype=FLOATS)
@pytest.mark.parametrize("causal", [False, True])
def test_all_shapes(by: str, dtype: torch.dtype, shape: tuple[int, ...], causal: bool) -> None:
    hold(normal(*shape, scale=3.0), dtype, causal=causal, by=by)


@crossed(mask=[(2, 1, 1, 37), (1, 3, 1, 37), (1, 1, 20, 37), (2, 3, 20, 37)], dtype=FLOATS)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_every_broadcast_shape(dtype: torch.dtype, mask: tuple[int, ...], causal: bool) -> None:
    hold(normal(2, 3, 20, 37), dtype, mask=mask_of(*mask), causal=causal)


@pytest.mark.parametrize("by", ["torch", "triton"])
@pytest.mark.parametrize(("queries", "keys"), [(4, 9), (9, 4), (1, 9), (9, 1)])
def test_the_last_query_sees_the_last_key(by: str, queries: int, keys: int) -> None:
    x = normal(2, 2, queries, keys).float().requires_grad_()
    y = scaled_masked_softmax(x, 1.0, causal=True, by=by)
    y.backward(normal(2, 2, queries, keys, seed=1).float())
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    assert torch.equal(y[0, 0].cpu() != 0, seen)
    assert (x.grad.cpu()[:, :, ~seen] == 0).all()
    hold(normal(2, 2, queries, keys), torch.float32, causal=True, by=by)


@pytest.mark.parametrize("by", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_that_sees_nothing_is_zero_and_so_is_its_gradient(by: str, causal: bool) -> None:
    mask = mask_of(2, 1, 6, 10)
    mask[1, 0, 3] = mask[0, 0, 0] = False
    x = normal(2, 3, 6, 10).float().requires_grad_()
    y = scaled_masked_softmax(x, 1.0, mask=mask, causal=causal, by=by)
    y.backward(normal(2, 3, 6, 10, seed=1).float())
    for blind in (y[1, :, 3], x.grad[1, :, 3], y[0, :, 0], x.grad[0, :, 0]):
        assert (blind == 0).all()
    assert y.isfinite().all() and x.grad.isfinite().all()


@crossed(scale=[1.0, -2.0, 0.0], dtype=FLOATS)
def test_scores_and_scales_of_any_size(dtype: torch.dtype, scale: float) -> None:
    x = normal(1, 1, 6, 300)
    x[:, :, 1] *= 1e4
    x[:, :, 2] = 3e4
    x[:, :, 3] = -3e4
    x[:, :, 4] = 0
    hold(x, dtype, scale=scale)
    hold(x, dtype, scale=scale, causal=True)


def test_infinite_scores_that_are_not_seen_do_no_harm() -> None:
    x = normal(1, 1, 4, 40).float()
    mask = mask_of(1, 1, 4, 40)
    expected = scaled_masked_softmax(x, 1.0, mask=mask, causal=True, by="triton")
    x[~mask] = float("nan")
    x[:, :, :, 37:][:, :, 0] = float("inf")
    assert torch.equal(scaled_masked_softmax(x, 1.0, mask=mask, causal=True, by="triton"), expected)


@pytest.mark.parametrize("causal", [False, True])
@crossed(masked=[False, True], dtype=[torch.float32, torch.bfloat16])
def test_rows_longer_than_a_tile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, causal: bool,
                                 masked: bool) -> None:
    monkeypatch.setattr(softmax, "WIDEST", 64)
    monkeypatch.setattr(softmax, "TILES", ((64, 2),))
    monkeypatch.setattr(softmax, "STEP_N", 32)
    hold(normal(2, 1, 5, 301, scale=3.0), dtype, mask=mask_of(2, 1, 1, 301) if masked else None, causal=causal)


def test_rows_of_20000_keys() -> None:
    hold(normal(1, 1, 3, 20000), torch.bfloat16, causal=True)


@crossed(layout=["sliced", "heads last", "transposed", "expanded"], dtype=[torch.float32, torch.bfloat16])
def test_scores_and_masks_laid_out_in_other_ways(dtype: torch.dtype, layout: str) -> None:
    views = {"sliced": lambda x: x[:, :, 1:7:2, 3:], "heads last": lambda x: x.transpose(1, 2),
             "transposed": lambda x: x.transpose(2, 3), "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1)}
    view, x = views[layout], normal(2, 8, 8, 20)
    shape = view(x).shape
    mask = mask_of(shape[3], shape[2], 1, shape[0]).permute(3, 2, 1, 0)
    assert_as_good(lambda x: scaled_masked_softmax(view(x), 0.5, mask=mask, by="triton"),
                   lambda x: formula(view(x), 0.5, mask), [x], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_laid_out_in_other_ways_are_left_as_they_are(dtype: torch.dtype) -> None:
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def expanded(y: torch.Tensor, number: int) -> torch.Tensor:
        return normal(1, 1, 1, y.shape[-1]).to(y.dtype).expand(y.shape)

    def constant(y: torch.Tensor, number: int) -> torch.Tensor:
        return torch.full((), 0.25, dtype=y.dtype, device=DEVICE).expand(y.shape)

    def transposed(y: torch.Tensor, number: int) -> torch.Tensor:
        grad = normal(*y.shape[:2], y.shape[3], y.shape[2]).to(y.dtype).transpose(2, 3)
        made.append((grad, grad.clone()))
        return grad

    for grads in (expanded, constant, transposed):
        hold(normal(2, 3, 5, 33), dtype, causal=True, grads=grads)
    assert made and all(torch.equal(grad, before) for grad, before in made)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = scaled_masked_softmax(x, 1.0, by="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_rows_further_apart_than_32_bits_count() -> None:
    stride, keys = 2**30 + 8, 40
    memory = torch.empty(2 * stride + 3 * keys, dtype=torch.bfloat16, device=DEVICE)  # 4.3 GB, hardly touched
    x = memory.as_strided((1, 3, 3, keys), (1, stride, keys, 1))
    x.copy_(normal(1, 3, 3, keys))
    y = forward(x.clone(), 1.0, None, False)
    assert torch.equal(forward(x, 1.0, None, False), y)
    assert torch.equal(backward(x, y, 1.0, False), backward(x.clone(), y, 1.0, False))


def test_a_mask_of_another_kind_is_refused() -> None:
    x = normal(2, 2, 3, 4).float()
    for mask in (mask_of(2, 1, 1, 3), mask_of(3, 4), torch.zeros(1, 1, 3, 4, device=DEVICE), mask_of(2, 2, 3, 1)):
        with pytest.raises(ValueError, match="must be boolean"):
            scaled_masked_softmax(x, 1.0, mask=mask, by="triton")


def test_reruns_have_the_same_bits() -> None:
    mask = mask_of(2, 1, 1, 130)
    assert_repeats(lambda x: scaled_masked_softmax(x, 0.3, mask=mask, causal=True, by="triton"),
                   [normal(2, 3, 20, 130)], torch.bfloat16)


def test_the_operators_are_what_they_say() -> None:
    x, mask = normal(2, 2, 3, 5).float(), mask_of(2, 1, 1, 5)
    torch.library.opcheck(forward, (x.clone().requires_grad_(), 0.3, mask, True))
    torch.library.opcheck(forward, (x.clone().requires_grad_(), 0.3, None, False))
    torch.library.opcheck(backward, (x, forward(x, 0.3, mask, True), 0.3, True))


def test_compiled_code_gives_the_same() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return scaled_masked_softmax(x * 2, 0.3, causal=True, by="triton")

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        x = normal(2, 2, 5, 33).float().requires_grad_()
        y = function(x)
        y.backward(normal(2, 2, 5, 33, seed=1).float())
        found.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
