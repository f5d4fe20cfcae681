"""Causal attention with grouped queries: y = softmax(scale q k^T + mask) v.

Query head j reads key/value head j // (heads / kv_heads). What a query sees may be bounded by causality, by a sliding
window and by the documents packed into a sequence; the kernels (forward.py, backward.py) load nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.attention import backward as _backward
from engine.kernels.attention import forward as _forward
from engine.kernels.attention.documents import Documents
from engine.kernels.attention.reference import reference, sdpa, statistics

__all__ = ["Documents", "attention", "attention_statistics", "merge"]

WIDEST = 256
"""Columns of a head that the kernels' tiles hold."""
Tensor = torch.Tensor
Bounds = Tensor | None


def _laid_out(x: Tensor) -> Tensor:
    """Memory for a tensor like x [batch, heads, seq, d], laid out [batch, seq, heads, d]."""
    batch, heads, seq, d = x.shape
    return x.new_empty(batch, seq, heads, d).transpose(1, 2)


def _run_forward(q: Tensor, k: Tensor, v: Tensor, start: Bounds, end: Bounds, causal: bool, window: int,
                 scale: float) -> tuple[Tensor, Tensor]:
    return _forward.forward(q, k, v, start, end, causal, window, scale)


def _run_backward(dy: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
                  start: Bounds, end: Bounds, causal: bool, window: int,
                  scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _backward.backward(dy, dlse, q, k, v, y, lse, start, end, causal, window, scale)


_TAIL = "Tensor? start, Tensor? end, bool causal, int window, float scale"
_forward_op = torch.library.custom_op(
    "triax::attention", _run_forward, mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)")
_backward_op = torch.library.custom_op(
    "triax::attention_backward", _run_backward, mutates_args=(),
    schema=f"(Tensor dy, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, {_TAIL}) "
           "-> (Tensor, Tensor, Tensor)")


@_forward_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _laid_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(dy: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _laid_out(q), _laid_out(k), _laid_out(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(ctx: Any, dy: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None and dlse is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # once: under recomputation they can be asked for only once
    grads = _backward_op(torch.zeros_like(saved[3]) if dy is None else dy, dlse, *saved, ctx.causal, ctx.window,
                         ctx.scale)
    return (*grads, *(None,) * 5)


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None,
              cumulative: Tensor | Documents | None = None, scale: float | None = None, by: str = "sdpa") -> Tensor:
    """q [batch, heads, seq, d], k and v [batch, kv_heads, keys, d] -> [batch, heads, seq, d].

    With `causal`, query i sees the keys up to keys - seq + i (the last queries of a longer sequence); with `window` w,
    of those, the last w alone. `cumulative` [documents + 1], whole numbers on the device: the cumulative lengths of
    documents over the batch's flattened tokens; a query then sees its own document alone, and the end of a row ends a
    document. Whoever calls for many layers gives them as `Documents`, made once. `scale` is 1 / sqrt(d) if not given. A
    query that sees nothing gives 0.
    by: "sdpa", "triton" (d at most 256; deterministic both ways), "reference" (the formula, scores whole) or "unfused"
    (the same with the softmax by Triton). ValueError for what does not fit.
    """
    _check(q, k, v, window, cumulative, by)
    documents = _documents(q, cumulative)
    if by == "triton":
        return _fused(q, k, v, causal, window, documents, scale)[0]
    if by == "sdpa":
        return sdpa(q, k, v, causal, window, documents, scale)
    return reference(q, k, v, causal, window, documents, scale, "triton" if by == "unfused" else "torch")


def attention_statistics(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None,
                         cumulative: Tensor | Documents | None = None, scale: float | None = None,
                         by: str = "reference") -> tuple[Tensor, Tensor]:
    """As `attention`, with the natural logarithm of each query's sum of exponentials [batch, heads, seq], -inf where it
    sees nothing; both have a gradient. What `merge` joins. by: "triton" or "reference"."""
    _check(q, k, v, window, cumulative, by)
    documents = _documents(q, cumulative)
    if by == "triton":
        return _fused(q, k, v, causal, window, documents, scale)
    return statistics(q, k, v, causal, window, documents, scale)


def merge(y: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: ring attention's step (arXiv:2310.01889).

    y, other [batch, heads, seq, d]; lse, other_lse [batch, heads, seq].
    """
    top = torch.maximum(lse, other_lse)
    base = top.masked_fill(top == float("-inf"), 0.0)  # a query that neither sees: exp(-inf), not NaN
    one, two = torch.exp(lse - base), torch.exp(other_lse - base)
    total = one + two
    none = total == 0
    safe = total.masked_fill(none, 1.0)
    joined = (y * (one / safe).unsqueeze(-1) + other * (two / safe).unsqueeze(-1)).to(y.dtype)
    return joined, (base + torch.log(safe)).masked_fill(none, float("-inf"))


def _documents(q: Tensor, given: Tensor | Documents | None) -> Documents | None:
    """The documents as the kernels read them."""
    return Documents.of(given, q.shape[0], q.shape[2]) if isinstance(given, Tensor) else given


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, documents: Documents | None,
           scale: float | None) -> tuple[Tensor, Tensor]:
    """y and lse by the kernels."""
    start, end = (None, None) if documents is None else (documents.start, documents.end)
    y, lse = _forward_op(q, k, v, start, end, causal, window or 0, q.shape[-1] ** -0.5 if scale is None else scale)
    return y, lse


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, cumulative: Tensor | Documents | None, by: str) -> None:
    (batch, heads, seq, d), (_, kv_heads, keys, _) = q.shape, k.shape
    if k.shape != (batch, kv_heads, keys, d) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together")
    if not q.dtype == k.dtype == v.dtype:  # the kernels would read the others' memory as if it were q's dtype
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; attention needs one dtype")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys sees nothing")
    if cumulative is not None and seq != keys:
        raise ValueError(f"documents need as many queries as keys, not {seq} and {keys}")
    if isinstance(cumulative, Documents) and cumulative.start.shape != (batch * seq,):
        raise ValueError(f"documents of {cumulative.start.numel()} tokens do not belong to q {list(q.shape)}")
    if by == "triton" and d > WIDEST:
        raise ValueError(f"attention by 'triton' takes heads of up to {WIDEST} columns, these have {d}")
    if by not in ("sdpa", "triton", "reference", "unfused"):
        raise ValueError(f"attention's by is {by!r}; there are 'sdpa', 'triton', 'reference' and 'unfused'")
