"""--mask-documents: what stands before a document in its sample does not reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.batches import Batch, share_of
from engine.kernels.attention import Documents, attention
from engine.model import Decoder, Parts
from engine.parallel.micro_batch import MicroBatch
from tests.parallel import toys


@pytest.mark.parametrize("model", toys.MODELS)
def test_a_document_sees_nothing_of_the_one_before_it(model: str) -> None:
    config = toys.make_config(toys.MODELS[model])
    decoder = Decoder(Parts(config.model, dtype=torch.float64), range(config.model.layers))
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.1)
    tokens = torch.randint(101, (2, 12))
    other = tokens.clone()
    other[:, :5] = (tokens[:, :5] + 1) % 101
    documents = torch.tensor([0, 5, 12, 17, 24], dtype=torch.int32)
    with torch.no_grad():
        apart = [decoder(ids, MicroBatch.of(ids, documents=documents)) for ids in (tokens, other)]
        mixed = [decoder(ids) for ids in (tokens, other)]
    assert torch.equal(apart[0][:, 5:], apart[1][:, 5:])
    assert not torch.equal(apart[0][:, :5], apart[1][:, :5])
    assert not torch.allclose(mixed[0][:, 5:], mixed[1][:, 5:])


def test_cumulative_lengths_of_micro_batches() -> None:
    begins = np.zeros((3, 6), bool)
    begins[0, 2] = begins[1, 0] = begins[2, 5] = True
    batch = Batch(np.zeros((3, 6)), np.zeros((3, 6)), begins)
    assert [part.tolist() for part in batch.cumulative(2, 6) or ()] == [[0, 2, 6, 12], [0, 5, 6]]
    # A sequence filled up with ignored tokens: they belong to its last document.
    assert [part.tolist() for part in batch.cumulative(1, 8) or ()] == [[0, 2, 8], [0, 8], [0, 5, 8]]
    assert Batch(batch.tokens, batch.labels).cumulative(2, 6) is None


def test_an_uneven_share_keeps_its_documents() -> None:
    begins = np.eye(3, 4, dtype=bool)
    batch = Batch(np.zeros((3, 4)), np.zeros((3, 4)), begins)
    shares = [share_of(batch, rank, 2).begins for rank in range(2)]
    assert shares[0] is not None and shares[1] is not None
    np.testing.assert_array_equal(np.concatenate(shares), np.pad(begins, ((0, 1), (0, 0))))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_documents_are_found_once_a_micro_batch(recompute: str) -> None:
    """Not once a layer, nor again where a block is run again."""
    flags = f"{toys.MODELS['llama']} --mask-documents --micro-batch 2 --recompute {recompute}"
    engine = toys.make_engine(toys.make_config(flags), 0, 1)
    with Named("searchsorted") as calls:
        toys.train(engine, 1)
    assert calls.count == 2  # a step of four sequences


class Named(TorchDispatchMode):
    """Counts the calls of an operation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.count = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).split(".")[1] == self.name
        return func(*args, **(kwargs or {}))


def test_documents_of_other_tokens_are_refused() -> None:
    q = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match=r"documents of 6 tokens do not belong to q \[2, 1, 4, 8\]"):
        attention(q, q, q, cumulative=Documents.of(torch.tensor([0, 6]), 1, 6))
