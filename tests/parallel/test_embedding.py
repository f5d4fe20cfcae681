"""The embedding's gradient: rows added to the bucket, in one order, and nothing of the matrix' size beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.model.decoder import Embedding
from engine.model.parts import Parts
from engine.parallel.buckets import GradientBuckets
from engine.parallel.collectives import TensorParallel
from engine.parallel.layers import VocabParallelEmbedding, vocab_parameter
from engine.parallel.micro_batch import MicroBatch
from tests.parallel import toys

VOCAB, HIDDEN = 500, 8


class Largest(TorchDispatchMode):
    """The operations under it, and the most elements of a tensor that one of them has made; `known` is not counted."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.most = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func).split(".")[1])
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() != self.known:
                self.most = max(self.most, leaf.numel())
        return result


def layer(tp: TensorParallel, dtype: torch.dtype) -> tuple[VocabParallelEmbedding, GradientBuckets]:
    weight = vocab_parameter("e", VOCAB, 512, HIDDEN, std=1.0, tp=tp, tied=False, uses=1, primary=True, dtype=dtype,
                             device=torch.device("cpu"))
    weight.data.normal_()
    embedding = VocabParallelEmbedding(weight, tp)
    return embedding, GradientBuckets(embedding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_added_without_a_tensor_of_the_matrix_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding, buckets = layer(TensorParallel(), dtype)
    main = buckets.buckets[0].grads
    main.fill_(7.0)  # what an earlier step has left
    wanted = torch.zeros(512, HIDDEN, dtype=main.dtype)
    for _ in range(3):
        ids = torch.randint(0, 20, (2, 9))
        grad = torch.randn(2, 9, HIDDEN).to(dtype)
        with Largest(main) as made:
            x = embedding(ids)
            x.backward(grad)
        assert made.most <= ids.numel() * HIDDEN
        assert not {"masked_fill", "masked_fill_", "where", "lt", "ge"} & set(made.names), "nothing is masked here"
        assert torch.equal(x, F.embedding(ids, embedding.weight))
        wanted.index_add_(0, ids.flatten(), grad.flatten(0, 1).to(main.dtype))
    assert torch.equal(main.view(512, HIDDEN), wanted)


class Silent:
    """A group whose sums are one's own."""

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Adds nothing."""


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_shard_takes_what_is_its_own(rank: int) -> None:
    tp: Any = TensorParallel(Silent(), rank, 4)  # type: ignore[arg-type]
    embedding, buckets = layer(tp, torch.float64)
    ids = torch.arange(VOCAB).view(2, -1)
    embedding(ids).backward(torch.ones(2, VOCAB // 2, HIDDEN, dtype=torch.float64))
    main = buckets.buckets[0].grads.view(-1, HIDDEN)
    real = min(VOCAB - rank * 128, 128)
    assert (main[:real] == 1).all() and (main[real:] == 0).all()
    x = embedding(ids).view(VOCAB, HIDDEN)
    own = slice(rank * 128, rank * 128 + real)
    assert torch.equal(x[own], embedding.weight[:real]) and x.abs().sum() == x[own].abs().sum()


def test_learned_positions_are_added_row_by_row_too() -> None:
    config = toys.make_config(f"{toys.MODELS['gpt2']} --max-positions 512").model
    weight = vocab_parameter("e", 20, 64, config.hidden, std=1.0, tp=TensorParallel(), tied=False, uses=1, primary=True,
                             dtype=torch.float64, device=torch.device("cpu"))
    module = Embedding(weight, Parts(config, dtype=torch.float64))
    GradientBuckets(module)
    assert module.positions is not None
    grad = torch.randn(2, 3, config.hidden, dtype=torch.float64)
    for _ in range(2):
        micro = MicroBatch.of(torch.ones(2, 3, dtype=torch.long))
        with Largest(module.positions.main_grad) as made:
            module(micro.tokens, micro.positions).backward(grad)
        assert made.most <= grad.numel()
    assert torch.equal(module.positions.main_grad[:3], 2 * grad.sum(0))
    assert not module.positions.main_grad[3:].any()
