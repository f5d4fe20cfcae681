"""The plain kernels against float64: error at most twice PyTorch's own in the same dtype, plus one rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.config import Layout
from engine.kernels.activation import gelu, swiglu
from engine.kernels.adamw import adamw_
from engine.kernels.adamw import reference as adamw_reference
from engine.kernels.attention import attention
from engine.kernels.cross_entropy import IGNORE, cross_entropy
from engine.kernels.norm import layer_norm, rms_norm
from engine.kernels.rope import rope_split, rope_table
from engine.mesh import build_mesh

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
Function = Callable[..., torch.Tensor]


def make(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def run(function: Function, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The result in a dtype and the gradients of all inputs, of a loss with uneven weights, as float64.

    The inputs are those of the narrowest dtype, so that only the arithmetic differs.
    """
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(make(*y.shape, seed=9).bfloat16().to(y.dtype))
    return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def assert_as_good(ours: Function, torchs: Function, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Asserts the rule for the result and for every gradient."""
    wanted = run(torchs, inputs, torch.float64)
    found, known = run(ours, inputs, dtype), run(torchs, inputs, dtype)
    assert len(found) == len(wanted) == len(known)
    for which, (true, mine, theirs) in enumerate(zip(wanted, found, known, strict=True)):
        rounding = torch.finfo(dtype).eps / 2 * float(true.abs().max())
        if dtype == torch.float64:  # the truth itself is rounded as much: neither is nearer to the real numbers
            rounding = 64 * torch.finfo(dtype).eps * max(1.0, float(true.abs().max()))
        bound = 2 * float((theirs - true).abs().max()) + rounding
        error = float((mine - true).abs().max())
        assert error <= bound, f"output {which}: error {error:.3g}, at most {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 513])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm(dtype: torch.dtype, width: int, scale: float) -> None:
    inputs = [make(3, 5, width, scale=scale), make(width, seed=1)]
    assert_as_good(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (width,), w, 1e-5), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: torch.dtype) -> None:
    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w + b

    def torchs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return plain(x, w, b) if x.dtype == torch.float64 else F.layer_norm(x, (64,), w, b, 1e-5)

    inputs = [make(3, 5, 64), make(64, seed=1), make(64, seed=2)]
    assert_as_good(lambda x, w, b: layer_norm(x, w, b, 1e-5), torchs, inputs, dtype)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradients_of_many_bf16_rows_do_not_drown(norm: str) -> None:
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        x, weight, bias = (t.bfloat16().to(dtype).requires_grad_() for t in (make(4096, 64), make(64), make(64)))
        y = rms_norm(x, weight, 1e-5) if norm == "rms" else layer_norm(x, weight, bias, 1e-5)
        y.backward((make(4096, 64, seed=5) + 1).bfloat16().to(dtype))
        found.append([g.double() for g in (weight.grad, bias.grad) if g is not None])
    for true, mine in zip(*found, strict=True):
        assert float((mine - true).abs().max()) <= 2**-8 * float(true.abs().max())


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """x [batch, seq, heads, d] turned pair by pair: (x_i, x_{i + d/2}) as a complex number times e^(i position f)."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = (positions.double()[:, None] * frequency)[:, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2)])
def test_rope_turns_q_and_k_and_leaves_v(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    positions = torch.arange(5, 16)
    turned = heads + kv_heads

    def ours(x: torch.Tensor) -> torch.Tensor:
        parts = rope_split(x.clone(), *rope_table(positions, 8, 1e4, x.dtype), heads, kv_heads)
        assert [part.shape[1] for part in parts] == [heads, kv_heads, kv_heads]
        return torch.cat(parts, 1).transpose(1, 2)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([rotated(x[:, :, :turned], positions, 1e4), x[:, :, turned:]], 2)

    x = make(2, 11, turned + kv_heads, 8)
    assert_as_good(ours, plain, [x], dtype)
    assert torch.equal(ours(x.to(dtype))[:, :, turned:], x.to(dtype)[:, :, turned:])


def test_rope_depends_on_distances_alone() -> None:
    x = make(1, 1, 3, 64)

    def product(here: int, there: int) -> float:
        q, _, _ = rope_split(x.clone(), *rope_table(torch.tensor([here]), 64, 1e4, x.dtype), 1, 1)
        _, k, _ = rope_split(x.clone(), *rope_table(torch.tensor([there]), 64, 1e4, x.dtype), 1, 1)
        return float((q * k).sum())

    assert math.isclose(product(7, 3), product(1007, 1003), rel_tol=1e-10)
    assert not math.isclose(product(7, 3), product(7, 4), rel_tol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_swiglu_and_gelu(dtype: torch.dtype, scale: float) -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    assert_as_good(swiglu, plain, [make(4, 7, 34, scale=scale)], dtype)

    def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    assert_as_good(gelu, tanh_gelu, [make(4, 7, 17, scale=scale)], dtype)


def labels_for(tokens: int, vocab: int) -> torch.Tensor:
    """Labels of which every third is not supervised; the first and the last of the vocabulary are among them."""
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::3] = IGNORE
    labels[1], labels[2] = 0, vocab - 1
    return labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_cross_entropy_with_labels_that_are_ignored(dtype: torch.dtype, scale: float) -> None:
    labels = labels_for(20, 101)
    assert_as_good(lambda x: cross_entropy(x.clone(), labels, vocab=101),
                   lambda x: F.cross_entropy(x, labels, ignore_index=IGNORE, reduction="none"),
                   [make(20, 101, scale=scale)], dtype)
    logits = make(20, 101).requires_grad_()
    loss = cross_entropy(logits.clone(), labels, vocab=101)
    loss.sum().backward()
    assert (loss[labels == IGNORE] == 0).all() and (logits.grad[labels == IGNORE] == 0).all()


def test_cross_entropy_does_not_see_padding() -> None:
    labels, logits = labels_for(20, 101), make(20, 101)
    padded = torch.cat([logits, torch.full((20, 27), 1e3, dtype=torch.float64)], 1).requires_grad_()
    loss = cross_entropy(padded.clone(), labels, vocab=101)
    loss.sum().backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none"))
    assert (padded.grad[:, 101:] == 0).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_cross_entropy_over_shards_of_an_odd_vocabulary(ranks: Any, dtype: str) -> None:
    labels = labels_for(20, 101)
    logits = make(20, 101).to(getattr(torch, dtype)).requires_grad_()
    whole = cross_entropy(logits.clone(), labels, vocab=101)
    (whole * torch.arange(20)).sum().backward()
    results = ranks(3, shard, dtype=dtype)
    bound = 2 * torch.finfo(getattr(torch, dtype)).eps
    for loss, _ in results:
        torch.testing.assert_close(torch.tensor(loss, dtype=whole.dtype), whole, rtol=2 * torch.finfo(whole.dtype).eps,
                                   atol=8 * torch.finfo(whole.dtype).eps)
        assert loss == results[0][0], "the same bits on all ranks"
    gradient = torch.cat([torch.tensor(part, dtype=torch.float64) for _, part in results], 1)
    assert (gradient[:, 101:] == 0).all()
    torch.testing.assert_close(gradient[:, :101], logits.grad.double(), rtol=bound, atol=bound)


def shard(rank: int, world: int, dtype: str) -> tuple[list[float], list[list[float]]]:
    """On a rank: 50 of the 150 columns of a vocabulary of 101 (the last rank has padding but for one); loss and
    gradient."""
    logits = F.pad(make(20, 101), (0, 49), value=7.0).to(getattr(torch, dtype))
    mine = logits[:, rank * 50 : rank * 50 + 50].contiguous().requires_grad_()
    mesh = build_mesh(Layout(tp=world), rank, 1, timedelta(seconds=60))
    loss = cross_entropy(mine.clone(), labels_for(20, 101), first=rank * 50, vocab=101, group=mesh.group("tp"))
    (loss * torch.arange(20)).sum().backward()
    assert mine.grad is not None
    return loss.tolist(), mine.grad.double().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "queries", "keys"), [(4, 9, 9), (2, 9, 9), (1, 5, 9), (2, 1, 9)])
@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
def test_attention(dtype: torch.dtype, kv_heads: int, queries: int, keys: int, implementation: str) -> None:
    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(16)
        unseen = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
        return scores.masked_fill(unseen, float("-inf")).softmax(-1) @ v

    inputs = [make(2, 4, queries, 16), make(2, kv_heads, keys, 16, seed=1), make(2, kv_heads, keys, 16, seed=2)]
    assert_as_good(lambda q, k, v: attention(q, k, v, by=implementation), plain, inputs, dtype)


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
def test_attention_does_not_look_ahead(implementation: str) -> None:
    q, k, v = (make(1, 2, 8, 16, seed=seed) for seed in range(3))
    before = attention(q, k, v, by=implementation)
    k[:, :, 5:], v[:, :, 5:] = 100.0, -100.0
    after = attention(q, k, v, by=implementation)
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_attention_without_causality_sees_all() -> None:
    q, k, v = (make(1, 2, 3, 16, seed=seed) for seed in range(3))
    first, second = (attention(q, k, v, causal=False, by=name) for name in ("sdpa", "reference"))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(dtype: torch.dtype, decay: float) -> None:
    def ours(kernel: Callable[..., None], dtype: torch.dtype) -> torch.Tensor:
        p, m, v = make(1000).to(dtype), torch.zeros(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
        for step in range(1, 21):
            gradient = make(1000, seed=step, scale=10.0 ** (step % 7 - 4)).to(dtype)
            kernel(p, gradient, m, v, step=step, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=decay)
        return p.double()

    def torchs(dtype: torch.dtype) -> torch.Tensor:
        p = torch.nn.Parameter(make(1000).to(dtype))
        optimizer = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, foreach=False)
        for step in range(1, 21):
            p.grad = make(1000, seed=step, scale=10.0 ** (step % 7 - 4)).to(dtype)
            optimizer.step()
        return p.detach().double()

    true = torchs(torch.float64)
    bound = 2 * float((torchs(dtype) - true).abs().max()) + torch.finfo(dtype).eps * float(true.abs().max())
    for kernel in (adamw_, adamw_reference):
        error = float((ours(kernel, dtype) - true).abs().max())
        assert error <= (bound if dtype == torch.float32 else 1e-14), kernel.__module__
