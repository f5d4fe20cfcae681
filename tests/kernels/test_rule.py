"""What the tests of kernels stand on sees what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kernels.language import INTERPRETING, jit, rounded, tl
from tests.kernels.rule import APPROXIMATE, DEVICE, FLOATS, assert_as_good, bound, needs_triton, normal


@jit
def _combine(x, y, out, OPERATION: tl.constexpr):
    a, b = tl.load(x), tl.load(y)
    if OPERATION == "add":
        tl.store(out, a + b)
    elif OPERATION == "sub":
        tl.store(out, a - b)
    else:
        tl.store(out, a * b)


@needs_triton
@pytest.mark.skipif(not INTERPRETING, reason="compiled kernels do not check for overflow")
@pytest.mark.parametrize(("operation", "a", "b"), [("add", 2**31 - 1, 1), ("sub", -2**31, 1), ("mul", 2**16, 2**15)])
def test_a_32_bit_integer_that_overflows_is_an_error_and_a_64_bit_one_is_none(operation: str, a: int, b: int) -> None:
    def combine(dtype: torch.dtype, b: int) -> int:
        x, y, out = (torch.tensor(value, dtype=dtype, device=DEVICE) for value in (a, b, 0))
        _combine[(1,)](x, y, out, operation)
        return int(out)

    exact: dict[str, Any] = {"add": a + b, "sub": a - b, "mul": a * b}
    with pytest.raises(Exception, match=f"int32 overflows in {operation}"):
        combine(torch.int32, b)
    assert combine(torch.int64, b) == exact[operation]
    assert combine(torch.int32, 0) == (0 if operation == "mul" else a)


@jit
def _round(x, y, count, BLOCK_N: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)
    value = tl.load(x + offs, mask=offs < count)
    tl.store(y + offs, rounded(value, y.dtype.element_ty), mask=offs < count)


@needs_triton
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_rounding_of_every_store_is_that_of_torch(dtype: torch.dtype) -> None:
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]  # half way, in bf16 and in fp16
    edges = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.0, -65520.0, 3.39e38, -2e-38, 6e-8]
    values = torch.tensor(ties + [-tie for tie in ties] + edges, dtype=torch.float32)
    x = torch.cat([values, torch.randn(400, generator=torch.Generator().manual_seed(0)) * 100]).to(DEVICE)
    y = torch.empty(len(x), dtype=dtype, device=DEVICE)
    _round[(1,)](x, y, len(x), BLOCK_N=512)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_result_or_a_gradient_that_is_wrong_is_seen() -> None:
    x = normal(50)
    assert_as_good(lambda x: x * 1.5, lambda x: x * 1.5, [x], torch.bfloat16)
    for wrong in (0.02, float("nan")):
        with pytest.raises(AssertionError, match="result 0"):
            assert_as_good(lambda x, wrong=wrong: x * 1.5 + wrong, lambda x: x * 1.5, [x], torch.bfloat16)
    with pytest.raises(AssertionError, match="result 1"):
        assert_as_good(lambda x: x * 1.5 + 0.02 * (x - x.detach()), lambda x: x * 1.5, [x], torch.bfloat16)


def test_approximate_instructions_are_allowed_for_in_fp32_on_a_gpu_alone() -> None:
    true = torch.tensor([1.0, -3.0], dtype=torch.float64)
    theirs = true + 1e-3
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        exact = 2e-3 + 1.5 * eps  # twice torch's error, and half an eps of the largest element
        more = APPROXIMATE * 3 * eps if dtype == torch.float32 else 0.0
        assert bound(true, theirs, dtype, "cpu") == pytest.approx(exact, rel=1e-12)
        assert bound(true, theirs, dtype, "cuda") == pytest.approx(exact + more, rel=1e-12)
        assert bound(true, theirs, dtype, "cpu", cancelling=8.0) == pytest.approx(exact + 8 * eps, rel=1e-12)
    assert bound(true[:0], theirs[:0], torch.float32, "cuda") == 0.0
