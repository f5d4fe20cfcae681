"""What the tests of kernels share: where they run, inputs, and the rule that a result is held to.

Without a GPU kernels run in Triton's interpreter on CPU tensors (tests/conftest.py switches it on); with one, the same
tests run what was compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels.language import INTERPRETING

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
APPROXIMATE = 4
"""Units of eps that a GPU's approximate instructions may cost in fp32: exp2, rsqrt, sqrt and division by Triton are off
by 1 to 2 each, and a kernel chains a few, where torch's kernels call the exact functions."""
Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

needs_triton = pytest.mark.skipif(find_spec("triton") is None,
                                  reason="triton is not installed: its kernels are not here")


def quicken() -> None:
    """Triton's interpreter without its two largest costs, two thirds of its time; what it computes stays."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_new(function: Callable[..., Any]) -> Any:
        """triton.language is adapted at each call of a function by a kernel: here once for each file in a launch."""
        names = id(function.__globals__)
        if names in patched:
            return interpreter._LangPatchScope()
        patched.add(names)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        patched.clear()  # the end of a launch takes back what it began with
        launch(self, *args, **options)

    def overflow(one: Any, other: Any, operation: Callable[..., Any]) -> None:
        """Asserts that signed integers of up to 32 bits do not overflow. Triton computes as much by its own operations,
        which are interpreted, and then asserts nothing."""
        a, b = one.handle.data, other.handle.data
        if a.dtype.kind == "i" and a.dtype.itemsize < 8:
            exact = OPERATIONS[operation.__name__](a.astype(np.int64), b.astype(np.int64))
            fits = np.iinfo(a.dtype)
            assert fits.min <= exact.min() and exact.max() <= fits.max, f"{a.dtype} overflows in {operation.__name__}"

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch_anew
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = staticmethod(overflow)


if INTERPRETING:
    quicken()


def crossed(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by every combination where kernels are compiled, which they are anew for most of them. In the
    interpreter, where a dtype or a label changes no path but its own, each value runs with others in turn."""
    if INTERPRETING:
        longest = max(map(len, values.values()))
        rows = [tuple(value[i % len(value)] for value in values.values()) for i in range(longest)]
    else:
        rows = list(itertools.product(*values.values()))
    return pytest.mark.parametrize(tuple(values), rows, ids=["-".join(str(v).removeprefix("torch.") for v in row)
                                                             for row in rows])


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float64 that bf16 holds exactly, so that inputs are the same in every dtype."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.bfloat16().double().to(DEVICE)


def run(function: Function, inputs: Sequence[torch.Tensor], dtype: torch.dtype,
        grads: Callable[[torch.Tensor, int], torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Results in a dtype, then the gradients of all inputs that have one, of a sum with uneven weights; as float64.

    `grads(y, number)` makes the gradient of each result, for layouts that are not plain (expanded, transposed). Inputs
    keep their strides. Integer inputs stay as they are.
    """
    leaves = [_cast(x, dtype) for x in inputs]
    found = function(*leaves)
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    smooth = [(i, y) for i, y in enumerate(results) if y.requires_grad]
    make = grads or (lambda y, number: normal(*y.shape, seed=90 + number).to(y.dtype))
    if smooth:
        torch.autograd.backward([y for _, y in smooth], [make(y, i) for i, y in smooth])
    return [*(y.detach().double() for y in results), *(x.grad.double() for x in leaves if x.grad is not None)]


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not x.is_floating_point():
        return x
    # Strides survive: a leaf made from a sliced or transposed tensor is laid out like it.
    copy = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device) if _dense(x) else x.to(dtype).clone()
    return copy.copy_(x).requires_grad_()


def _dense(x: torch.Tensor) -> bool:
    """Whether every element has a place of its own (an expanded tensor's have not)."""
    return all(stride > 0 for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


def bound(true: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, device: str, cancelling: float = 0.0) -> float:
    """The largest error that a result in a dtype may have: twice PyTorch's, and one rounding of the float64 result
    (flash-attention's rule); in fp32 on CUDA also APPROXIMATE eps, which 16 bits round away.

    `cancelling`: the size of terms that cancel to a result which is zero; their rounding is then allowed too.
    """
    if true.numel() == 0:
        return 0.0
    eps, size = torch.finfo(dtype).eps, float(true.abs().max())
    allowed = 2 * float((theirs - true).abs().max()) + eps / 2 * size + eps * cancelling
    if device == "cuda" and dtype == torch.float32:
        allowed += APPROXIMATE * eps * (size + cancelling)
    return allowed


def assert_as_good(ours: Function, torchs: Function, inputs: Sequence[torch.Tensor], dtype: torch.dtype,
                   grads: Callable[[torch.Tensor, int], torch.Tensor] | None = None, cancelling: float = 0.0) -> None:
    """Asserts, for every result and gradient, that our error against float64 is within `bound`."""
    wanted = run(torchs, inputs, torch.float64, grads)
    found, known = run(ours, inputs, dtype, grads), run(torchs, inputs, dtype, grads)
    assert len(found) == len(wanted) == len(known)
    for which, (true, mine, theirs) in enumerate(zip(wanted, found, known, strict=True)):
        assert mine.shape == true.shape
        allowed = bound(true, theirs, dtype, DEVICE.type, cancelling)
        error = float((mine - true).abs().max()) if true.numel() else 0.0
        assert error <= allowed, f"result {which}: error {error:.3g}, at most {allowed:.3g}"  # NaN fails


def assert_repeats(function: Function, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Asserts that two runs give the same bits, forward and backward."""
    for one, other in zip(run(function, inputs, dtype), run(function, inputs, dtype), strict=True):
        assert torch.equal(one, other)
