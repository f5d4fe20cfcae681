"""Cross-entropy on logits, both ways: three passes over them are the floor (statistics; gradient, read and written)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cases.base import FEW, TOKENS, Build, Case, Run
from engine.kernels.cross_entropy import launch_gradient_, launch_reduction, launch_statistics


class Alone:
    """A group of one rank: what is timed is this rank's work, without the messages."""

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
        """The sum over one rank."""


def inputs(device: torch.device, tokens: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens, columns] and labels."""
    logits = torch.empty(tokens, columns, dtype=dtype, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    if device.type != "meta":
        logits.normal_()
        labels.random_(columns)
    return logits, labels


def ours(tokens: int, columns: int, dtype: torch.dtype, ranks: int = 1) -> Build:
    """The logits are used up: their gradient is the next run's logits, which takes as long."""
    def build(device: torch.device) -> Run:
        logits, labels = inputs(device, tokens, columns, dtype)
        grads = torch.full((tokens,), 1 / tokens, device=device)
        vocab = columns * ranks

        def run() -> torch.Tensor:
            losses, tops, sums = launch_statistics(logits, labels, 0, vocab, 0.0, ranks == 1)
            if ranks > 1:
                launch_reduction(tops, sums, labels, losses, columns, 0, vocab, 0.0, Alone())
            launch_gradient_(logits, labels, tops, sums, grads, 1.0, 0, vocab, 0.0)
            return losses

        return run

    return build


def differentiated(tokens: int, columns: int, dtype: torch.dtype,
                   loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], compiled: bool = False) -> Build:
    """A peer: the mean loss and its backward pass."""
    def build(device: torch.device) -> Run:
        logits, labels = inputs(device, tokens, columns, dtype)
        logits.requires_grad_()
        function = torch.compile(loss) if compiled else loss

        def run() -> torch.Tensor | None:
            logits.grad = None
            function(logits, labels).backward()
            return logits.grad

        return run

    return build


def liger(tokens: int, columns: int, dtype: torch.dtype) -> Build:
    """Its gradient is made in the forward pass, in the memory of the logits: they are used up, as ours are."""
    def build(device: torch.device) -> Run | None:
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except ImportError:
            return None
        logits, labels = inputs(device, tokens, columns, dtype)
        logits.requires_grad_()

        def run() -> torch.Tensor | None:
            logits.grad = None
            liger_cross_entropy(logits, labels).backward()
            return logits.grad

        return run

    return build


def formula(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss over one rank's columns, each step a pass, as vocabulary-parallel code is mostly written."""
    wide = logits.float()
    wide = wide - wide.amax(-1, keepdim=True).detach()
    here = labels < logits.shape[1]
    label = wide.gather(-1, labels.where(here, 0).unsqueeze(-1)).squeeze(-1).where(here, 0)
    return (wide.exp().sum(-1).log() - label).mean()


def case(tokens: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """All columns on one rank."""
    return Case(
        kernel="cross-entropy", shape=f"{tokens} x {columns}", dtype={2: "bf16", 4: "fp32"}[dtype.itemsize],
        build=ours(tokens, columns, dtype), bytes=3 * tokens * columns * dtype.itemsize, target=0.80,
        peers={"torch eager": differentiated(tokens, columns, dtype, F.cross_entropy),
               "torch.compile": differentiated(tokens, columns, dtype, F.cross_entropy, compiled=True),
               "Liger": liger(tokens, columns, dtype)})


def parallel_case(tokens: int, columns: int, ranks: int) -> Case:
    """One rank's share of the columns."""
    return Case(
        kernel="vocabulary-parallel cross-entropy", shape=f"{tokens} x {columns} of {columns * ranks}", dtype="bf16",
        build=ours(tokens, columns, torch.bfloat16, ranks), bytes=3 * tokens * columns * 2, target=0.75,
        peers={"formula in torch": differentiated(tokens, columns, torch.bfloat16, formula),
               "formula, torch.compile": differentiated(tokens, columns, torch.bfloat16, formula, compiled=True)})


CASES, TINY = ([case(tokens, 128256), case(tokens, 32000), case(tokens, 32000, torch.float32),
                parallel_case(tokens, 16032, 8)] for tokens in (TOKENS, FEW))
