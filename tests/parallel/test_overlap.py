"""Under sequence parallelism messages travel while the device multiplies: what is started before, what waited for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.comm.comm import Comm
from engine.parallel import layers
from engine.parallel.collectives import TensorParallel
from engine.parallel.layers import ColumnParallelLinear, VocabParallelHead, vocab_parameter
from engine.parallel.sharding import split_rows

PRODUCTS = ("mm", "addmm")


class Logged(Comm):
    """Rank 0 of two, whose neighbour holds the same; it writes down what is started and what is waited for."""

    def __init__(self, log: list[str]) -> None:
        super().__init__([0, 1], 0)
        self.log = log

    def _started(self, name: str) -> Any:
        self.log.append(name)
        return _Work(self.log, name)

    def start_all_reduce_(self, x: torch.Tensor, op: str = "sum") -> Any:
        return self._started("reduce")

    def start_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Any:
        out.copy_(flat[: len(out)] * 2)
        return self._started("scatter")

    def start_all_gather(self, out: torch.Tensor, flat: torch.Tensor) -> Any:
        out.copy_(torch.cat([flat, flat]))
        return self._started("gather")


class _Work:
    """A message under way."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait(self) -> None:
        """Writes down that it was waited for."""
        self.log.append(f"{self.name} waited")


class Products(TorchDispatchMode):
    """Writes matrix products into the log."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in PRODUCTS:
            self.log.append("product")
        return func(*args, **(kwargs or {}))


def test_a_column_linear_gathers_its_input_while_it_multiplies() -> None:
    log: list[str] = []
    tp = TensorParallel(Logged(log), 0, 2, sequence=True)
    layer = ColumnParallelLinear((split_rows("w", (12, 8), 0, 2),), (), inputs=8, std=1.0, tp=tp, dtype=torch.float32,
                                 device=torch.device("cpu"))
    layer.weight.data.normal_()
    x = torch.randn(1, 3, 8, requires_grad=True)
    y = layer(x)
    assert log == ["gather", "gather waited"]
    log.clear()
    with Products(log):
        y.backward(torch.randn_like(y))
    assert log == ["gather", "product", "gather waited", "scatter", "product", "scatter waited"]


@pytest.mark.parametrize("chunk", [2, 3, 6])
def test_the_heads_gradient_travels_while_the_last_chunk_multiplies(
        monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(layers, "linear_cross_entropy", partial(layers.linear_cross_entropy, chunk=chunk))
    log: list[str] = []
    tp = TensorParallel(Logged(log), 0, 2, sequence=True)
    weight = vocab_parameter("w", 120, 128, 8, std=1.0, tp=tp, tied=False, uses=1, primary=True, dtype=torch.float32,
                             device=torch.device("cpu"))
    weight.data.normal_()
    head = VocabParallelHead(weight, tp, 120, "torch")
    with Products(log):
        _, grad = head.loss(torch.randn(1, 3, 8), torch.arange(6).view(1, 6), 1.0)
    assert grad is not None and grad.shape == (1, 3, 8)
    # Of a chunk the products are its logits, its part of x's gradient and its part of the weight's.
    assert [word for word in log if not word.startswith("reduce")] == [
        "gather", "gather waited", *["product"] * (3 * (6 // chunk) - 1), "scatter", "product", "scatter waited"]
