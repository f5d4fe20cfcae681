"""The sharded optimizer (ZeRO stage 1, arXiv:1910.02054): each dp rank updates its rows of every bucket.

Order of a step, and why: partial gradients are summed over tp (or the kv group, or the tied pair of stages) on the
shard, after the dp sum, where they are smallest; then the global norm; then the device decides whether the step is
skipped, because something is not finite, and how far gradients are clipped; then AdamW on the shard, and the all-gather
of the new parameters, which the next forward pass waits for, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.config import OptimizerConfig
from engine.kernels.adamw import adamw_
from engine.kernels.gradient_norm import sum_of_squares
from engine.mesh import Mesh
from engine.parallel.buckets import Bucket, GradientBuckets
from engine.parallel.sharding import Entry


@dataclass
class Moments:
    """Optimizer state of one bucket's shard, flat; `master` is the shard of the parameters where they are wide."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    separate: bool


class ShardedAdamW:
    """AdamW over the shards of all buckets of this rank."""

    def __init__(self, chunks: Sequence[GradientBuckets], config: OptimizerConfig, mesh: Mesh,
                 by: str = "torch") -> None:
        self.config = config
        self.by = by
        self.mesh = mesh
        self.buckets = [bucket for chunk in chunks for bucket in chunk.buckets]
        self.moments = [_moments(bucket) for bucket in self.buckets]
        self.steps = 0

    def step(self, lr: float, control: torch.Tensor) -> None:
        """Updates the parameters with the gradients in the buckets, unless `control` says to skip (see `control`).

        It is the step after `steps`, which the caller raises when it learns that none was skipped.
        """
        # Buckets are in the order of the backward pass; the next forward pass waits for the first layers first.
        for bucket, state in reversed(list(zip(self.buckets, self.moments, strict=True))):
            adamw_(state.master, bucket.shard_grads, state.exp_avg, state.exp_avg_sq, step=self.steps + 1, lr=lr,
                   beta1=self.config.beta1, beta2=self.config.beta2, eps=self.config.adam_eps,
                   weight_decay=self.config.weight_decay if bucket.decay else 0.0, control=control,
                   out=bucket.shard_data if state.separate else None, by=self.by)
            bucket.gather()

    def gather(self) -> None:
        """Starts to give every rank the rows of the parameters that others have loaded; all ranks call it."""
        for bucket in reversed(self.buckets):
            bucket.gather()

    def arrive(self) -> None:
        """Returns when every parameter is whole: after `step` it waits for the rows that other ranks updated."""
        for bucket in self.buckets:
            bucket.arrive()

    def squares(self) -> torch.Tensor:
        """Completes the gradients, and gives the sum of squares of this rank's part of them, a float64 scalar on the
        device. Over the world each logical element counts once: padding and copies are left out."""
        self.arrive()
        self._sum_partial()
        views = [bucket.shard_grads[span]
                 for bucket in self.buckets for piece, span in bucket.shard_pieces() if piece.member.primary]
        return sum_of_squares(views, by=self.by).to(self.buckets[0].grads.device)

    def control(self, loss: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """(scale, skip), float64 [2] on the device: by what the gradients are multiplied to be clipped, and whether the
        step is skipped because the loss or the global norm, the root of `squares`, is not finite."""
        norm = squares.sqrt()
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0) if self.config.clip > 0 else torch.ones_like(norm)
        return torch.stack([scale, 1.0 - (loss.isfinite() & norm.isfinite()).double()])

    def _sum_partial(self) -> None:
        """Sums what each rank has only a part of: one flat message a group."""
        for name in ("tp", "kv"):
            group = self.mesh.group(name)
            if group is None:
                continue
            views = [bucket.shard_grads[span] for bucket in self.buckets
                     for piece, span in bucket.shard_pieces() if piece.member.partial == name]
            if views:
                flat = torch.cat(views)
                group.all_reduce_(flat)
                for view, part in zip(views, flat.split([v.numel() for v in views]), strict=True):
                    view.copy_(part)
        self._sum_tied()

    def _sum_tied(self) -> None:
        """Sums the gradients of the embedding and its copy at the head, on another stage or on another chunk here."""
        tied = [bucket.shard_grads for bucket in self.buckets if bucket.tied]
        edge = self.mesh.group("edge")
        if edge is not None:
            for grads in tied:
                edge.all_reduce_(grads)
        elif tied:
            first, second = tied
            second.copy_(first.add_(second))

    def entries(self) -> Iterator[Entry]:
        """This rank's part of a checkpoint, to save or to load: weights, master weights and moments of its rows."""
        self.arrive()
        for bucket, state in zip(self.buckets, self.moments, strict=True):
            parts = [("model", bucket.shard_data), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)]
            if state.separate:
                parts.append(("master", state.master))
            for piece, span in bucket.shard_pieces():
                for kind, flat in parts:
                    yield Entry(kind, piece, flat[span].view(piece.extent))

    def reset_master(self) -> None:
        """Takes the master weights from the parameters, after weights were initialised or loaded without them."""
        for bucket, state in zip(self.buckets, self.moments, strict=True):
            if state.separate:
                state.master.copy_(bucket.shard_data)


def _moments(bucket: Bucket) -> Moments:
    separate = bucket.data.dtype != bucket.grads.dtype
    master = bucket.shard_data.to(bucket.grads.dtype) if separate else bucket.shard_data
    return Moments(master, torch.zeros_like(bucket.shard_grads), torch.zeros_like(bucket.shard_grads), separate)
