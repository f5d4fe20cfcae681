"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import OptimizerConfig
from engine.train.schedule import learning_rate


def curve(steps: int, **fields: object) -> list[float]:
    config = OptimizerConfig(**fields)  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert curve(8, lr=1.0, warmup=4, decay="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert curve(3, lr=1.0, decay="constant") == [1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_half_way_to_the_middle() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, decay="cosine")
    found = [learning_rate(config, step, 100) for step in (0, 25, 50, 100)]
    wanted = [1.0, 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2]
    assert found == pytest.approx(wanted, rel=1e-12)


def test_linear_falls_evenly_to_a_tenth_unless_told_otherwise() -> None:
    found = curve(11, lr=1.0, warmup=1, decay="linear")
    assert all(math.isclose(a - b, 0.09) for a, b in zip(found[1:], found[2:], strict=False))
    assert math.isclose(learning_rate(OptimizerConfig(lr=1.0, warmup=1, decay="linear"), 11, 11), 0.1)
    assert learning_rate(OptimizerConfig(lr=1.0, min_lr=0.0, decay="linear"), 10, 10) == 0.0


@given(st.integers(1, 200), st.integers(0, 250), st.sampled_from(["cosine", "linear", "constant"]),
       st.floats(0, 1, allow_subnormal=False), st.floats(0, 1))
def test_it_stays_between_its_ends_and_never_rises_after_the_warm_up(
        steps: int, warmup: int, decay: str, lr: float, share: float) -> None:
    found = curve(steps, lr=lr, min_lr=lr * share, warmup=warmup, decay=decay)
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in found)
    after = found[warmup:]
    assert all(b <= a * (1 + 1e-12) and b >= lr * share * (1 - 1e-12) for a, b in zip(after, after[1:], strict=False))


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_a_warm_up_longer_than_the_run_only_warms_up(decay: str) -> None:
    assert curve(3, lr=1.0, warmup=10, decay=decay) == [0.1, 0.2, 0.3]
