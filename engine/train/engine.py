"""One rank's model, optimizer and executor: what a step does, without the loop around it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from engine.comm.heart import Phase
from engine.config import RunConfig
from engine.config.recompute import read_recompute
from engine.data.batches import Batch
from engine.errors import UserError
from engine.kernels.attention.documents import Documents
from engine.kernels.cross_entropy import IGNORE
from engine.kernels.dispatch import Kernels
from engine.mesh import Mesh
from engine.model import Decoder, Parts
from engine.parallel.buckets import GradientBuckets, Replicas
from engine.parallel.collectives import TensorParallel
from engine.parallel.executor import Chunk, Executor, make_chunks
from engine.parallel.init import initialize
from engine.parallel.micro_batch import MicroBatch
from engine.parallel.optimizer import ShardedAdamW
from engine.plan import balanced_stages
from engine.train.schedule import learning_rate

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What one step computed, the same on every rank. `stop` is set when any rank was asked to stop. Of the global
    batch, padding left out: `tokens`, how many of them are `supervised`, and `squares`, the sum of each sequence's
    length times itself, to which the work of attention is proportional."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    supervised: int
    squares: int
    crc: int
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether the weights moved."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Rider(Protocol):
    """What goes on beside the steps on all ranks, and agrees on how far it is in the message that a step ends with."""

    def before_update(self) -> None:
        """Called in a step before weights and optimizer state change."""

    def numbers(self) -> tuple[float, float]:
        """What this rank adds to the message."""
        ...

    def heard(self, first: float, second: float, /) -> None:
        """The sums of all ranks' numbers; what it raises, it raises on every rank."""


class NoRider:
    """Nothing goes on beside the steps."""

    def before_update(self) -> None: ...

    def numbers(self) -> tuple[float, float]:
        return 0.0, 0.0

    def heard(self, first: float, second: float, /) -> None: ...


class Engine:
    """Builds this rank's part of the model and trains it."""

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype,
                 kernels: Kernels | None = None) -> None:
        self.config = config
        self.mesh = mesh
        self.device = device
        tp = TensorParallel(mesh.group("tp"), mesh.tp, mesh.size("tp"),
                            config.parallel.sequence_parallel and mesh.size("tp") > 1)
        self.parts = Parts(config.model, tp, dtype, device, kernels or Kernels(),
                           read_recompute(config.runtime.recompute))
        virtual = config.parallel.virtual_stages
        self.stages = balanced_stages(config, mesh.size("pp") * virtual)
        self.chunks: list[Chunk] = make_chunks(mesh, virtual, self._build)
        self.executor = Executor(self.chunks, mesh, config.parallel.schedule)
        self.optimizer = ShardedAdamW([c.buckets for c in self.chunks if c.buckets], config.optimizer, mesh,
                                      self.parts.kernels.optimizer)
        self.positions = lru_cache(2)(lambda seq: torch.arange(seq, device=device))  # one tensor for equal lengths
        self.rider: Rider = NoRider()
        self.step = 0

    def _build(self, stage: int) -> tuple[Decoder, GradientBuckets]:
        first, last = stage == 0, stage == len(self.stages) - 1
        model = Decoder(self.parts, self.stages[stage], first=first, last=last)
        replicas = {"dp": Replicas(self.mesh.group("dp"), self.mesh.dp, self.mesh.size("dp"))}
        buckets = GradientBuckets(model, replicas, wide_products=self.parts.kernels.wide_products)
        return model, buckets

    def models(self) -> Iterator[Decoder]:
        """This rank's chunks of the model, their weights whole."""
        self.optimizer.arrive()
        for chunk in self.chunks:
            assert isinstance(chunk.model, Decoder)
            yield chunk.model

    def initialize(self) -> None:
        """Fills the weights from the seed and their names."""
        for model in self.models():
            for parameter in model.parameters():
                initialize(parameter, self.config.runtime.seed)
        self.optimizer.reset_master()

    def train_step(self, batch: Batch, stop: bool = False) -> StepResult:
        """One optimizer step on this rank's part of the global batch. Raises UserError when nothing is supervised."""
        self.mesh.heart.enter(Phase.FORWARD, self.step + 1)
        micros = self._micro_batches(batch)
        total, read, squares = self._counts(batch)
        if total == 0:
            raise UserError(f"step {self.step + 1}: no token of the global batch is supervised; look at the labels")
        loss_sum = self.executor.train(micros, total)
        lr = learning_rate(self.config.optimizer, self.step, self.config.batch.steps)
        self.mesh.heart.enter(Phase.OPTIMIZER)
        numbers = self._report(loss_sum, crc_of(batch), stop, self.optimizer.squares())
        self.rider.before_update()
        self.optimizer.step(lr, self.optimizer.control(numbers[0], numbers[-1]))
        loss, crc, stops, *ridden, norm2 = self._read(numbers)  # the device is at work on the update by now
        self.step += 1
        result = StepResult(loss / total, math.sqrt(norm2), lr, read, total, squares, int(crc), stops > 0)
        if result.finite:
            self.optimizer.steps += 1
        self.rider.heard(*ridden)
        return result

    def evaluate(self, batches: Sequence[Batch], stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss over the supervised tokens of all batches of all dp ranks; None when any rank's `stop()` has become
        true between two of them."""
        self.mesh.heart.enter(Phase.EVALUATION)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        total = 0
        for done, batch in enumerate(batches):
            if done and self._agreed_sums(torch.zeros_like(loss), stop())[1]:
                return None
            micros = self._micro_batches(batch)
            total += self._counts(batch)[0]
            loss += self.executor.evaluate(micros)
        return self._agreed_sums(loss, False)[0] / max(1, total)

    def _agreed_sums(self, loss: torch.Tensor, stop: bool) -> tuple[float, float]:
        """The loss and the wish to stop, summed as `_report` does between steps."""
        loss_sum, _, stops, *ridden, _ = self._read(self._report(loss, 0, stop))
        self.rider.heard(*ridden)
        return loss_sum, stops

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """The batch on the device, cut into micro-batches; under sequence parallelism padded to a length that tp
        divides, labels ignored."""
        size, seq = self.config.batch.micro_batch, batch.tokens.shape[1]
        padded = seq + (-seq % self.parts.tp.size if self.parts.tp.sequence else 0)
        tokens, labels = self._to_device(batch.tokens), self._to_device(batch.labels)
        if padded > seq:
            tokens = F.pad(tokens, (0, padded - seq))
            labels = F.pad(labels, (0, padded - seq), value=IGNORE)
        positions = self.positions(padded)
        cumulative = batch.cumulative(size, padded)
        return [MicroBatch(part, positions, own, None if cumulative is None else
                           Documents.of(self._to_device(cumulative[i]), *part.shape))
                for i, (part, own) in enumerate(zip(tokens.split(size), labels.split(size), strict=True))]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def _counts(self, batch: Batch) -> tuple[int, int, int]:
        """(supervised tokens, tokens, squares) of the global batch, as in StepResult; summed over dp in one message,
        before the backward pass, which divides by the first. A full batch needs none: then the host waits for the
        device once a step, at its end."""
        if batch.full:
            sequences, seq = batch.tokens.shape[0] * self.mesh.size("dp"), batch.tokens.shape[1]
            return sequences * seq, sequences * seq, sequences * seq * seq
        lengths = batch.own_lengths()
        own = [np.count_nonzero(batch.labels != IGNORE), lengths.sum(), (lengths * lengths).sum()]
        counts = torch.tensor([int(number) for number in own], device=self.device)
        dp = self.mesh.group("dp")
        if dp is not None:
            dp.all_reduce_(counts)
        with self.mesh.heart.waits():  # on a GPU it is here that the host waits, not where the message starts
            supervised, tokens, squares = counts.tolist()
        return supervised, tokens, squares

    def _report(self, loss: torch.Tensor, crc: int, stop: bool, squares: torch.Tensor | None = None) -> torch.Tensor:
        """Sums over the world, in one message, float64 [6] on the device: the loss (the last stage's, once a tp group),
        the samples' checksum (once a dp rank), the wish to stop, the rider's two numbers, the gradients' squares."""
        voice = self.mesh.tp == 0 and self.mesh.pp == self.mesh.size("pp") - 1
        own = loss.new_tensor([float(crc if voice else 0), float(stop), *self.rider.numbers()])
        squares = torch.zeros_like(loss) if squares is None else squares
        spoken = loss if voice else torch.zeros_like(loss)
        return self._sum(torch.cat([spoken.view(1), own, squares.view(1)]))

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The sums of some numbers over all ranks; every rank calls it with as many."""
        return self._read(self._sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)))

    def _sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The one message of the whole world: sums of float64 numbers."""
        world = self.mesh.group("world")
        if world is not None:
            world.all_reduce_(numbers)
        return numbers

    def _read(self, numbers: torch.Tensor) -> list[float]:
        """Numbers of the device on the host, which waits for them here."""
        with self.mesh.heart.waits():
            return numbers.tolist()  # type: ignore[no-any-return]


def crc_of(batch: Batch) -> int:
    """A sum of checksums of the batch's sequences: the same for every layout that reads the same samples."""
    return sum([zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in batch.tokens])
