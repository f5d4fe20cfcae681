"""The Triton cross-entropy against float64, its memory, and its bits over ranks that share a vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.comm.comm import TorchComm
from engine.kernels.cross_entropy import IGNORE, cross_entropy, gradient_, statistics
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, crossed, needs_triton, normal

# The interpreter's numpy tells of infinities and NaN, which here are meant.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]
SHARDED_VOCAB = 101  # over 2 ranks of 60 columns, or 4 of 40: the last of the four has nothing but padding


def labels_for(tokens: int, vocab: int) -> torch.Tensor:
    """Every third is not supervised; the first and the last of the vocabulary are among them."""
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::3] = IGNORE
    labels[1:3] = torch.tensor([0, vocab - 1])[: labels[1:3].numel()]
    return labels.to(DEVICE)


def formula(x: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """Losses in torch, of logits that are all vocabulary."""
    wide = x if x.dtype == torch.float64 else x.float()
    losses = F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="none")
    return losses + (z_loss * wide.logsumexp(-1).square()).masked_fill(labels == IGNORE, 0) if z_loss else losses


def hold(logits: torch.Tensor, dtype: torch.dtype, z_loss: float = 0.0, grads: Any = None) -> None:
    """The rule for these logits."""
    labels = labels_for(*logits.shape)
    assert_as_good(lambda x: cross_entropy(x * 1, labels, vocab=logits.shape[1], z_loss=z_loss, by="triton"),
                   lambda x: formula(x, labels, z_loss), [logits], dtype, grads)


@crossed(logits=[(1, 1, 1.0), (2, 1, 1.0), (3, 7, 1.0), (5, 1024, 50.0), (7, 1025, 1.0), (4, 4099, 3.0),
                 (2, 32003, 1.0)], dtype=FLOATS)
def test_losses_and_gradients_are_as_good_as_torchs(logits: tuple[int, int, float], dtype: torch.dtype) -> None:
    tokens, columns, scale = logits
    hold(normal(tokens, columns, scale=scale), dtype)


def test_a_vocabulary_of_128256() -> None:
    hold(normal(2, 128256), torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_z_loss(dtype: torch.dtype) -> None:
    hold(normal(6, 1500, scale=5.0), dtype, z_loss=1e-2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_logits_of_any_size(dtype: torch.dtype) -> None:
    logits = normal(8, 300)
    logits[1] *= 1e4
    logits[2] = 3e4
    logits[4] = -3e4
    logits[5] = 0
    logits[7, ::2] = float("-inf")
    logits[7, -1] = 1
    hold(logits, dtype)


def test_fp32_logits_far_beyond_fp16() -> None:
    logits = normal(3, 300) * 1e30
    hold(logits.float().double(), torch.float32)


@pytest.mark.parametrize("by", ["torch", "triton"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_row_without_any_logit_has_no_loss_and_no_gradient(by: str, z_loss: float) -> None:
    logits = normal(5, 70).float()
    logits[1] = logits[3] = float("-inf")
    logits.requires_grad_()
    labels = labels_for(5, 70)
    losses = cross_entropy(logits * 1, labels, vocab=70, z_loss=z_loss, by=by)
    losses.sum().backward()
    assert losses[1] == 0 and (logits.grad[1] == 0).all() and (logits.grad[3] == 0).all()
    torch.testing.assert_close(losses[[2, 4]].double(), formula(logits.detach().double(), labels, z_loss)[[2, 4]])


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_a_label_that_cannot_be_costs_infinity_and_not_nan(by: str) -> None:
    logits = normal(2, 70).float()
    labels = torch.tensor([3, 4], device=DEVICE)
    logits[0, 3] = float("-inf")
    logits.requires_grad_()
    losses = cross_entropy(logits * 1, labels, vocab=70, by=by)
    losses.backward(torch.ones_like(losses))
    assert losses[0] == float("inf") and losses[1].isfinite() and logits.grad.isfinite().all()
    assert logits.grad[0, 3] == -1


def test_nan_is_not_hidden_but_in_rows_that_do_not_count() -> None:
    logits = normal(4, 70).float()
    logits[1, 5] = logits[3, 5] = float("nan")
    labels = torch.tensor([1, 2, 3, IGNORE], device=DEVICE)
    logits.requires_grad_()
    losses = cross_entropy(logits * 1, labels, vocab=70, by="triton")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False, False]
    assert logits.grad[1].isnan().all() and (logits.grad[3] == 0).all()


@pytest.mark.parametrize("filling", [1e3, float("nan")])
def test_padding_is_not_seen_and_gets_no_gradient(filling: float) -> None:
    labels, logits = labels_for(5, 1030), normal(5, 1030).float()
    padded = F.pad(logits, (0, 34), value=filling).requires_grad_()
    losses = cross_entropy(padded * 1, labels, vocab=1030, by="triton")
    losses.sum().backward()
    plain = logits.requires_grad_()
    expected = cross_entropy(plain * 1, labels, vocab=1030, by="triton")
    expected.sum().backward()
    assert torch.equal(losses, expected) and torch.equal(padded.grad[:, :1030], plain.grad)
    assert (padded.grad[:, 1030:] == 0).all()


@crossed(layout=["sliced", "offset", "transposed", "expanded"], dtype=[torch.float32, torch.bfloat16])
def test_logits_laid_out_in_other_ways(dtype: torch.dtype, layout: str) -> None:
    views = {"sliced": lambda x: x[:, :90], "offset": lambda x: x[1:7:2, 3:80], "transposed": lambda x: x.t(),
             "expanded": lambda x: x[:1].expand(6, -1)}
    view, x = views[layout], normal(9, 100)
    labels = labels_for(*view(x).shape)
    assert_as_good(lambda x: cross_entropy(view(x * 1), labels, vocab=view(x).shape[1], by="triton"),
                   lambda x: formula(view(x), labels), [x], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_laid_out_in_other_ways_are_left_as_they_are(dtype: torch.dtype) -> None:
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def expanded(y: torch.Tensor, number: int) -> torch.Tensor:
        return torch.full((), 0.25, dtype=y.dtype, device=DEVICE).expand(y.shape)

    def strided(y: torch.Tensor, number: int) -> torch.Tensor:
        grad = normal(y.shape[0], 3).to(y.dtype)[:, 1]
        made.append((grad, grad.clone()))
        return grad

    hold(normal(6, 300), dtype, grads=expanded)
    hold(normal(6, 300), dtype, grads=strided)
    assert made and all(torch.equal(grad, before) for grad, before in made)


def test_the_gradient_lies_in_the_memory_of_the_logits() -> None:
    logits = (normal(6, 300).bfloat16().requires_grad_() * 1)
    places: list[int] = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    cross_entropy(logits, labels_for(6, 300), vocab=300, by="triton").sum().backward()
    assert places == [logits.data_ptr()]


def test_no_tokens() -> None:
    logits = torch.empty(0, 50, device=DEVICE, requires_grad=True)
    losses = cross_entropy(logits * 1, labels_for(0, 50), vocab=50, by="triton")
    losses.sum().backward()
    assert losses.shape == (0,) and logits.grad.shape == (0, 50)


def test_rows_further_apart_than_32_bits_count() -> None:
    stride, columns = 2**30 + 8, 40
    memory = torch.empty(2 * stride + columns, dtype=torch.bfloat16, device=DEVICE)  # 4.3 GB, hardly touched
    logits = memory.as_strided((3, columns), (stride, 1))
    logits.copy_(normal(3, columns))
    labels = torch.tensor([0, 7, 39], device=DEVICE)
    leaf = logits.clone().requires_grad_()
    expected = cross_entropy(leaf * 1, labels, vocab=columns, by="triton")
    expected.sum().backward()
    losses, tops, sums = statistics(logits, labels, 0, columns, 0.0, True)
    gradient_(logits, labels, tops, sums, None, 1.0, 0, columns, 0.0)
    assert torch.equal(losses, expected) and torch.equal(logits, leaf.grad)


def test_reruns_have_the_same_bits() -> None:
    labels = labels_for(6, 5000)
    assert_repeats(lambda x: cross_entropy(x * 1, labels, vocab=5000, by="triton"), [normal(6, 5000)], torch.bfloat16)


def test_the_operators_are_what_they_say() -> None:
    logits, labels = normal(4, 50).float(), labels_for(4, 50)
    torch.library.opcheck(statistics, (logits, labels, 0, 50, 0.1, True))
    _, tops, sums = statistics(logits, labels, 0, 50, 0.1, True)
    torch.library.opcheck(gradient_, (logits, labels, tops, sums, torch.ones(4, device=DEVICE), 0.5, 0, 50, 0.1))
    torch.library.opcheck(gradient_, (logits, labels, tops, sums, None, 0.5, 0, 50, 0.1))


def test_compiled_code_gives_the_same() -> None:
    labels = labels_for(5, 130)

    def losses(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x * 2, labels, vocab=130, z_loss=1e-3, by="triton")

    found = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        x = normal(5, 130).float().requires_grad_()
        y = function(x)
        y.backward(torch.linspace(0.5, 1, 5, device=DEVICE))
        found.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("by", ["torch", "triton"])
@crossed(world=[2, 4], dtype=["float32", "bfloat16"])
def test_ranks_that_share_a_vocabulary_have_the_same_bits(ranks: Any, by: str, world: int, dtype: str) -> None:
    kind = getattr(torch, dtype)
    logits = shared_logits().to(kind).requires_grad_()
    labels = labels_for(9, SHARDED_VOCAB)
    whole = formula(logits[:, :SHARDED_VOCAB], labels, 1e-3)
    (whole * torch.arange(9, device=DEVICE)).sum().backward()
    results = ranks(world, share, by=by, dtype=dtype)
    assert all(loss == results[0][0] for loss, _ in results)
    torch.testing.assert_close(torch.tensor(results[0][0]), whole.detach().cpu(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([torch.tensor(part) for _, part in results], 1)
    bound = 8 * torch.finfo(kind).eps
    torch.testing.assert_close(gradient[:, :SHARDED_VOCAB], logits.grad[:, :SHARDED_VOCAB].cpu().float(), rtol=bound,
                               atol=bound)
    assert (gradient[:, SHARDED_VOCAB:] == 0).all()


def shared_logits() -> torch.Tensor:
    """Logits over the padded vocabulary: one row is empty on one rank, one is huge on another."""
    logits = normal(9, 160, scale=3.0)
    logits[4, :40] = float("-inf")
    logits[5, 41] = 300.0
    logits[:, SHARDED_VOCAB:] = 7.0
    return logits


def share(rank: int, world: int, by: str, dtype: str) -> tuple[list[float], list[list[float]]]:
    """On a rank: loss and gradient of its columns."""
    columns = {2: 60, 4: 40}[world]
    logits = shared_logits()[:, rank * columns : (rank + 1) * columns].to(getattr(torch, dtype)).requires_grad_()
    losses = cross_entropy(logits * 1, labels_for(9, SHARDED_VOCAB), first=rank * columns, vocab=SHARDED_VOCAB,
                           group=TorchComm(range(world), rank, None), z_loss=1e-3, by=by)
    (losses * torch.arange(9, device=DEVICE)).sum().backward()
    assert logits.grad is not None
    return losses.tolist(), logits.grad.float().tolist()
