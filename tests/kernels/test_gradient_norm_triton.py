"""The fused sum of squares against float64, at any size of number, alignment and split into tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine.kernels.gradient_norm import RUN, _runs, _sum_of_squares, sum_of_squares
from tests.kernels.rule import DEVICE, FLOATS, needs_triton, normal

pytestmark = needs_triton

LENGTHS = [1, 7, 0, RUN, 3, RUN + 1, 1, 5000]
"""Side by side in a buffer: tensors begin at every alignment, are empty, whole runs, and a little more."""


def side_by_side(dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    return list(normal(sum(LENGTHS), scale=scale).to(dtype).split(LENGTHS))


def truth(tensors: Sequence[torch.Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_that_of_float64(dtype: torch.dtype) -> None:
    found = sum_of_squares(side_by_side(dtype), by="triton")
    assert found.dtype == torch.float64 and found.shape == () and found.device.type == DEVICE.type
    assert float(found) == pytest.approx(truth(side_by_side(dtype)), rel=1e-13)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e25])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    tensors = side_by_side(torch.float32, scale)
    assert float(sum_of_squares(tensors, by="triton")) == pytest.approx(truth(tensors), rel=1e-13)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 8, -1])
def test_one_element_that_is_not_finite_is_seen(bad: float, where: int) -> None:
    tensors = side_by_side(torch.float32)
    torch.cat(tensors, out=(whole := torch.empty(sum(LENGTHS), device=DEVICE)))
    whole[where] = bad
    for by in ("triton", "torch"):
        assert not sum_of_squares(list(whole.split(LENGTHS)), by=by).isfinite()


def test_numbers_around_a_tensor_are_not_counted() -> None:
    whole = torch.full((3 * RUN,), float("nan"), device=DEVICE)
    whole[5 : RUN + 900] = 2.0
    assert float(sum_of_squares([whole[5 : RUN + 900]], by="triton")) == 4.0 * (RUN + 895)


def test_tensors_of_several_dtypes_and_layouts_make_one_sum() -> None:
    tensors = [normal(9, 33).float(), normal(40, 12, seed=1).bfloat16().T, normal(30, 30, seed=2).half()[::2, 1:],
               normal(1, seed=3).expand(50).float(), torch.empty(0, device=DEVICE), torch.full((), 3.0, device=DEVICE)]
    assert float(sum_of_squares(tensors, by="triton")) == pytest.approx(truth(tensors), rel=1e-13)


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_no_elements_sum_to_zero(by: str) -> None:
    assert float(sum_of_squares([], by=by)) == 0.0
    assert float(sum_of_squares([torch.empty(0, device=DEVICE), torch.empty(0, device=DEVICE)], by=by)) == 0.0


def test_the_same_tensors_give_the_same_bits() -> None:
    tensors = side_by_side(torch.float32)
    assert torch.equal(sum_of_squares(tensors, by="triton"), sum_of_squares(tensors, by="triton"))


def test_new_numbers_at_the_same_addresses_are_read() -> None:
    tensors = side_by_side(torch.float32)
    before = sum_of_squares(tensors, by="triton")
    for tensor in tensors:
        tensor.mul_(2.0)
    assert float(sum_of_squares(tensors, by="triton")) == 4.0 * float(before)


def test_torchs_sum_has_the_bits_of_each_norm_squared() -> None:
    tensors = side_by_side(torch.float32)
    expected = torch.stack([tensor.norm().double().square() for tensor in tensors]).sum()
    assert torch.equal(sum_of_squares(tensors), expected)


def test_whole_runs_begin_at_multiples_of_16_bytes_and_every_element_is_in_one_run() -> None:
    for itemsize, address, length in ((4, 4096, 3 * RUN), (4, 4100, 3 * RUN), (2, 4098, RUN + 6), (4, 4, 2), (2, 0, 1)):
        runs = _runs(((address, length),), itemsize, torch.device("cpu")).tolist()
        assert all(start % 16 == 0 for start, count in runs if count == RUN)
        ends = [start + itemsize * count for start, count in runs]
        assert [start for start, _ in runs] == [address, *ends[:-1]]
        assert sum(count for _, count in runs) == length and all(0 < count <= RUN for _, count in runs)


def test_tensors_past_two_to_the_31_elements_are_addressed() -> None:
    """Memory that nobody touched is not there yet: only the pages that are read take place."""
    far = torch.empty((1 << 31) + 2048, dtype=torch.bfloat16, device=DEVICE)
    views = [far[:1000], far[-1000:]]
    for view in views:
        view.copy_(normal(1000))
    assert float(sum_of_squares(views, by="triton")) == pytest.approx(truth(views), rel=1e-13)


def test_the_operation_is_one_that_torch_can_trace() -> None:
    tensors = [normal(40).float(), normal(7).bfloat16()]
    torch.library.opcheck(_sum_of_squares, (tensors,))

    def norm(*tensors: torch.Tensor) -> torch.Tensor:
        return sum_of_squares(tensors, by="triton").sqrt()

    traced = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*tensors), norm(*tensors))
