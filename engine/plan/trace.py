"""What one micro-batch keeps alive, read off the model's own code: forward and backward run on the meta device.

A meta tensor has a shape and no memory, so a 70B layer takes milliseconds. Every storage that an operation makes is
counted while something holds it, as an allocator would count it. Nothing here knows which tensors a layer saves: a
kernel that keeps less is seen to keep less.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
import torch._decomp
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import ModelConfig
from engine.config.recompute import NONE, SELECTIVE, Recompute
from engine.kernels.dispatch import Kernels
from engine.model import Decoder, Parts
from engine.parallel.buckets import GradientBuckets
from engine.parallel.collectives import TensorParallel
from engine.parallel.micro_batch import MicroBatch

META = torch.device("meta")
HIDDEN = "__dynamo_disable"
"""Where torch._compile keeps the form of a function that its compiler does not see."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One micro-batch on one rank: all that the activations depend on besides how many layers there are."""

    model: ModelConfig
    dtype: torch.dtype
    tp: int
    sequence_parallel: bool
    recompute: Recompute
    kernels: Kernels
    micro_batch: int
    seq_len: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch in one chunk: kept from forward to backward, and on top of that at the worst moment."""

    kept: int
    working: int


@dataclass
class Tracer:
    """Traces chunks, each kind once: what repeats with every layer is the difference of two short traces."""

    seen: dict[tuple[Shape, int, bool, bool], Activations] = field(default_factory=dict)

    def chunk(self, shape: Shape, layers: int, first: bool, last: bool) -> Activations:
        """Bytes of a chunk of `layers` layers, with the embedding if `first` and the head if `last`.

        Under sequence parallelism (arXiv:2205.05198) what every tp rank would hold whole is split over tp; the working
        memory is not, because gathered activations are whole for a moment.
        """
        found = self._chunk(shape, layers, first, last)
        if not shape.sequence_parallel or shape.tp == 1:
            return found
        # What all tp ranks hold alike is what grows with the residual stream's width: heads, MLP and vocabulary are
        # split over tp, and have widths of their own.
        double = replace(shape, model=replace(shape.model, hidden=2 * shape.model.hidden))
        alike = self._chunk(double, layers, first, last).kept - found.kept
        return Activations(found.kept - alike * (shape.tp - 1) // shape.tp, found.working)

    def _chunk(self, shape: Shape, layers: int, first: bool, last: bool) -> Activations:
        """The same without sequence parallelism."""
        whole = min(shape.recompute.blocks, layers)
        one, two = (self._trace(shape, n, first, last) for n in (1, 2))
        layer, rest = two.kept - one.kept, layers - whole
        working = max(one.working, two.working if rest > 1 else 0)
        if not whole:
            return Activations(one.kept + (layers - 1) * layer, working)
        # A block that is run again keeps its input alone. The rest of it comes back when its backward pass begins. By
        # then the blocks after it have gone, and of the head's part all but what it was given and the gradient of that.
        entry = shape.micro_batch * shape.seq_len * shape.model.hidden * shape.dtype.itemsize
        plain = replace(shape, recompute=NONE)
        single = self._trace(plain, 1, first, last).kept
        block = self._trace(plain, 2, first, last).kept - single
        head = single - self._trace(plain, 1, first, False).kept
        again = block - entry - head - rest * layer + 2 * last * entry + self._trace(plain, 1, False, False).working
        return Activations(one.kept - layer + rest * layer + whole * entry, max(working, again))

    def _trace(self, shape: Shape, layers: int, first: bool, last: bool) -> Activations:
        kind = SELECTIVE if shape.recompute.selective else NONE
        key = (replace(shape, sequence_parallel=False, recompute=kind), layers, first, last)
        if key not in self.seen:
            self.seen[key] = trace(key[0], layers, first, last)
        return self.seen[key]


def trace(shape: Shape, layers: int, first: bool, last: bool) -> Activations:
    """Forward and backward of one micro-batch through `layers` layers on the meta device.

    Neither sequence parallelism nor whole blocks that are run again: `Tracer` derives both from this.
    """
    parts = Parts(shape.model, TensorParallel(None, 0, shape.tp), shape.dtype, META, shape.kernels, shape.recompute)
    model = Decoder(parts, range(layers), first=first, last=last)
    buckets = GradientBuckets(model, wide_products=shape.kernels.wide_products).buckets
    size = (shape.micro_batch, shape.seq_len)
    micro = MicroBatch.of(torch.empty(size, dtype=torch.long, device=META))
    known = [flat for bucket in buckets for flat in (bucket.data, bucket.grads)]
    with _without_compiler(), _FusedAttention(), Live(known) as memory:
        x = torch.empty(size if first else (*size, shape.model.hidden), dtype=torch.long if first else shape.dtype,
                        device=META, requires_grad=not first)
        y = model(x, micro)
        kept = memory.live
        if last:
            _, grad = model.loss(y.detach(), torch.empty(size, dtype=torch.long, device=META))
        else:
            grad = torch.empty_like(y)
        torch.autograd.backward(y, grad)
    return Activations(kept, memory.peak - kept)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keeps torch from importing its compiler, which takes nearly as long as importing torch.

    Most operations on meta tensors are Python functions of torch, inside wrappers that hide them from the compiler and
    import it for that, unless the function has the attribute that is set here for as long as we trace. Where a version
    of torch has no such tables, wrappers or attribute, nothing is gained and nothing lost.
    """
    hidden: list[Any] = []
    if "torch._dynamo" not in sys.modules:
        for table in getattr(torch._decomp, "global_decomposition_table", {}).values():
            for function in table.values():
                for layer in _layers(function):
                    if isinstance(layer, FunctionType) and not hasattr(layer, HIDDEN):
                        hidden.append(layer)
                        setattr(layer, HIDDEN, layer)
    try:
        yield
    finally:
        for layer in hidden:
            delattr(layer, HIDDEN)


def _layers(function: Any) -> Iterator[Any]:
    """The functions that a wrapped one calls in turn (`__wrapped__` may name the original and skip a layer)."""
    pending = [function]
    while pending:
        layer = pending.pop()
        cells = getattr(layer, "__closure__", None) or ()
        names = getattr(getattr(layer, "__code__", None), "co_freevars", ())
        pending += [cell.cell_contents for name, cell in zip(names, cells, strict=True) if name == "fn"]
        yield layer


class Live(TorchDispatchMode):
    """Counts the bytes of storages made under it: `live` now, `peak` the most so far. `known` are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.counted = {tensor.untyped_storage()._cdata for tensor in known}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would otherwise import its whole compiler to keep it out of this class: a second at every start."""
        return False

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.counted:
            self.counted.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """On real devices SDPA is fused; for meta tensors torch takes the form that keeps all the scores."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Flash.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Flash(torch.autograd.Function):
    """The memory of flash attention (arXiv:2205.14135): q, k, v, y and one log-sum-exp a query are kept."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Laid out as [batch, seq, heads, head_dim], as the fused kernels write it.
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])
