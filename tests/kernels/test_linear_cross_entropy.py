"""Projection and cross-entropy in chunks give what the plain formula gives on whole logits, also over split rows."""

from __future__ import annotations

import torch

from engine.kernels.cross_entropy import IGNORE, cross_entropy
from engine.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.rule import normal

VOCAB = 101


def labels_for(tokens: int, vocab: int = VOCAB) -> torch.Tensor:
    """Every third is not supervised; the first and the last of the vocabulary are among them."""
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::3] = IGNORE
    labels[1:3] = torch.tensor([0, vocab - 1])[: labels[1:3].numel()]
    return labels


def test_one_chunk_in_torch_has_the_bits_of_the_cross_entropy_on_whole_logits() -> None:
    x, weight = normal(20, 16).float(), normal(VOCAB, 16, seed=1).float()
    leaf, labels = x.clone().requires_grad_(), labels_for(20)
    losses = cross_entropy(leaf @ weight.t(), labels, vocab=VOCAB)
    (0.25 * losses).sum().backward()
    found, dx = linear_cross_entropy(x, weight, labels, scale=0.25, vocab=VOCAB)
    assert torch.equal(found, losses) and torch.equal(dx, leaf.grad)
