"""Projection and cross-entropy in chunks give what the plain formula gives on whole logits, also over split rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.comm.comm import TorchComm
from engine.kernels.cross_entropy import IGNORE, cross_entropy
from engine.kernels.linear_cross_entropy import chunk_tokens, linear_cross_entropy, linear_cross_entropy_loss
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal

VOCAB = 101  # over 2 ranks of 60 columns, or 4 of 40: the last of the four has nothing but padding
BY = ["torch", pytest.param("triton", marks=needs_triton)]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's numpy, on exp(-inf)


def labels_for(tokens: int, vocab: int = VOCAB) -> torch.Tensor:
    """Every third is not supervised; the first and the last of the vocabulary are among them."""
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::3] = IGNORE
    labels[1:3] = torch.tensor([0, vocab - 1])[: labels[1:3].numel()]
    return labels.to(DEVICE)


def formula(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * sum(losses) in torch, on whole logits."""
    logits = x @ weight.t()
    wide = logits if x.dtype == torch.float64 else logits.float()
    return scale * F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("by", BY)
@crossed(case=[(13, VOCAB, None), (13, VOCAB, 4), (1, 1, None), (5, 1100, 1)], dtype=FLOATS)
def test_loss_and_gradients_are_as_good_as_torchs(by: str, case: tuple[int, int, int | None],
                                                  dtype: torch.dtype) -> None:
    tokens, vocab, chunk = case
    labels = labels_for(tokens, vocab)
    assert_as_good(lambda x, w: linear_cross_entropy_loss(x, w, labels, scale=0.3, vocab=vocab, chunk=chunk, by=by),
                   lambda x, w: formula(x, w, labels, 0.3), [normal(tokens, 24), normal(vocab, 24, seed=1)], dtype)


@pytest.mark.parametrize("chunk", [None, 3])
def test_fp64_is_exact_in_torch(chunk: int | None) -> None:
    labels, found = labels_for(10), []
    for loss in (lambda x, w: linear_cross_entropy_loss(x, w, labels, scale=0.3, vocab=VOCAB, chunk=chunk),
                 lambda x, w: formula(x, w, labels, 0.3)):
        x, weight = normal(10, 24).requires_grad_(), normal(VOCAB, 24, seed=1).requires_grad_()
        y = loss(x, weight)
        y.backward()
        found.append((y.detach(), x.grad, weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


def test_one_chunk_in_torch_has_the_bits_of_the_cross_entropy_on_whole_logits() -> None:
    x, weight = normal(20, 16).float(), normal(VOCAB, 16, seed=1).float()
    leaf, labels = x.clone().requires_grad_(), labels_for(20)
    losses = cross_entropy(leaf @ weight.t(), labels, vocab=VOCAB)
    (0.25 * losses).sum().backward()
    found, dx = linear_cross_entropy(x, weight, labels, scale=0.25, vocab=VOCAB)
    assert torch.equal(found, losses) and torch.equal(dx, leaf.grad)


@pytest.mark.parametrize("by", BY)
def test_padding_ignored_labels_and_the_z_loss(by: str) -> None:
    x, weight, labels = normal(9, 16), normal(VOCAB + 27, 16, seed=1), labels_for(9)
    leaf = x.clone().requires_grad_()
    logits = (leaf @ weight.t())[:, :VOCAB]
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") \
        + 0.01 * logits.logsumexp(-1).square().masked_fill(labels == IGNORE, 0)
    (0.5 * expected).sum().backward()
    parts: list[torch.Tensor] = []
    losses, dx = linear_cross_entropy(x.float(), weight.float(), labels, scale=0.5, vocab=VOCAB, z_loss=0.01, chunk=4,
                                      by=by, add_weight_grad=lambda d, rows, dx: parts.append(d.clone()))
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    dlogits = torch.cat(parts)
    assert (dlogits[:, VOCAB:] == 0).all() and (dlogits[labels == IGNORE] == 0).all()
    assert (losses[labels == IGNORE] == 0).all()


@pytest.mark.parametrize("by", BY)
def test_the_chunks_are_handed_on_with_their_finished_input_gradient(by: str) -> None:
    x, weight, labels = normal(10, 16).bfloat16(), normal(VOCAB, 16, seed=1).bfloat16(), labels_for(10)
    rows: list[torch.Tensor] = []
    dxs: list[torch.Tensor] = []

    def take(dlogits: torch.Tensor, part: torch.Tensor, dx: torch.Tensor | None) -> None:
        assert dx is not None and dlogits.shape == (part.shape[0], VOCAB) and dlogits.dtype == x.dtype
        rows.append(part)
        dxs.append(dx.clone())

    _, dx = linear_cross_entropy(x, weight, labels, scale=1.0, vocab=VOCAB, chunk=4, by=by, add_weight_grad=take)
    assert [len(part) for part in rows] == [4, 4, 2]
    assert torch.equal(torch.cat(rows), x) and torch.equal(torch.cat(dxs), dx)


@pytest.mark.parametrize("by", BY)
def test_evaluation_gives_the_losses_of_training_and_nothing_else(by: str) -> None:
    x, weight, labels = normal(10, 16).float(), normal(VOCAB, 16, seed=1).float(), labels_for(10)
    trained, _ = linear_cross_entropy(x, weight, labels, scale=0.1, vocab=VOCAB, by=by)
    losses, dx = linear_cross_entropy(x, weight, labels, scale=0.1, vocab=VOCAB, by=by, grad_x=False)
    assert dx is None and torch.equal(losses, trained) and not losses.requires_grad


@pytest.mark.parametrize("by", BY)
def test_inputs_laid_out_in_other_ways(by: str) -> None:
    labels = labels_for(9)
    assert_as_good(
        lambda x, w: linear_cross_entropy_loss(x.t(), w[:, 1:17], labels, scale=1.0, vocab=VOCAB, chunk=4, by=by),
        lambda x, w: formula(x.t(), w[:, 1:17], labels, 1.0), [normal(16, 9), normal(VOCAB, 20, seed=1)], torch.float32)


@pytest.mark.parametrize("by", BY)
def test_no_tokens(by: str) -> None:
    x, weight = torch.empty(0, 16, device=DEVICE), normal(VOCAB, 16).float()
    losses, dx = linear_cross_entropy(x, weight, labels_for(0), scale=1.0, vocab=VOCAB, by=by)
    assert losses.shape == (0,) and dx.shape == (0, 16)


@needs_triton
def test_reruns_have_the_same_bits() -> None:
    labels = labels_for(10)
    assert_repeats(lambda x, w: linear_cross_entropy_loss(x, w, labels, scale=1.0, vocab=VOCAB, chunk=4, by="triton"),
                   [normal(10, 24), normal(VOCAB, 24, seed=1)], torch.bfloat16)


@needs_triton
def test_compiled_code_gives_the_same() -> None:
    labels, found = labels_for(5), []

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy_loss(x * 2, weight, labels, scale=0.5, vocab=VOCAB, chunk=4, by="triton")

    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, weight = normal(5, 24).float().requires_grad_(), normal(VOCAB, 24, seed=1).float().requires_grad_()
        y = function(x, weight)
        y.backward()
        found.append((y.detach(), x.grad, weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_chunks_of_real_vocabularies_stay_small() -> None:
    assert chunk_tokens(128256) == 1024
    for columns in (32000, 50304, 128256, 128256 // 8, 262144):
        assert chunk_tokens(columns) * columns * 2 <= 2**28


@pytest.mark.parametrize("by", BY)
@crossed(world=[2, 4], dtype=["float32", "bfloat16"])
def test_ranks_that_share_a_vocabulary_add_up_to_one(ranks: Any, by: str, world: int, dtype: str) -> None:
    x, weight = (t.to(getattr(torch, dtype)).double() for t in sharded_inputs())
    x, weight = x.requires_grad_(), weight[:VOCAB].requires_grad_()
    labels = labels_for(10)
    expected = F.cross_entropy(x @ weight.t(), labels, ignore_index=IGNORE, reduction="none")
    (0.3 * expected).sum().backward()
    results = ranks(world, share, by=by, dtype=dtype)
    assert all(losses == results[0][0] for losses, _, _ in results), "the same bits on all ranks"
    eps = torch.finfo(getattr(torch, dtype)).eps
    bound = {"rtol": 16 * eps, "atol": 16 * eps}
    torch.testing.assert_close(torch.tensor(results[0][0]).double(), expected.detach().cpu(), **bound)
    dx = sum(torch.tensor(part).double() for _, part, _ in results)
    torch.testing.assert_close(dx, x.grad.cpu(), **bound)
    dweight = torch.cat([torch.tensor(part) for _, _, part in results]).double()
    torch.testing.assert_close(dweight[:VOCAB], weight.grad.cpu(), **bound)
    assert (dweight[VOCAB:] == 0).all()


def sharded_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x [10, 16] and the padded head [160, 16]; as bf16 their logits are still exact enough to compare."""
    return normal(10, 16, scale=0.5), normal(160, 16, seed=1, scale=0.5)


def share(rank: int, world: int, by: str, dtype: str) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """On a rank: losses, its part of x's gradient, and its rows of the weight's."""
    columns = {2: 60, 4: 40}[world]
    x, weight = (t.to(getattr(torch, dtype)) for t in sharded_inputs())
    mine = weight[rank * columns : (rank + 1) * columns]
    dweight = torch.zeros(columns, 16, device=DEVICE)
    losses, dx = linear_cross_entropy(
        x, mine, labels_for(10), scale=0.3, first=rank * columns, vocab=VOCAB, chunk=4, by=by,
        group=TorchComm(range(world), rank, None),
        add_weight_grad=lambda d, rows, dx: dweight.add_(d.float().t() @ rows.float()))
    assert dx is not None
    return losses.tolist(), dx.float().tolist(), dweight.tolist()
