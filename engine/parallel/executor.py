"""Runs a pipeline schedule on this rank: computes its actions in order and moves what passes between stages.

Sends never block and each receive is posted one action ahead, so messages travel while the rank computes. Forward
activations and gradients have a group of their own each, so neither waits for the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist

from engine.comm.heart import Phase, Waited
from engine.mesh import Mesh
from engine.parallel.buckets import GradientBuckets
from engine.parallel.micro_batch import MicroBatch
from engine.parallel.schedule import Action, Kind, build_schedule, forward_only, stage_of

Message = tuple[Kind, int, int]
"""(kind, micro-batch, global stage it is for)."""


class Stage(Protocol):
    """What the executor asks of a model: a part of it, told whether it is the last."""

    last: bool

    def __call__(self, x: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """Token ids or activations of a micro-batch -> activations."""
        ...

    def loss(self, x: torch.Tensor, labels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each token from the last stage's activations, 0 where not supervised, and the gradient of
        `scale` times their sum for x."""
        ...

    def losses(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The losses alone."""
        ...

    def boundary(self, batch: int, seq: int) -> torch.Tensor:
        """Empty memory for an activation between stages."""
        ...


@dataclass
class Chunk:
    """One chunk of the model on this rank, its gradient buckets (None for evaluation only) and its global stage."""

    model: Stage
    buckets: GradientBuckets | None
    stage: int


@dataclass
class _Traffic:
    """Messages under way: receives posted and not yet used, sends not yet known to have ended.

    A send's tensor lives until its end is known. A stage is never more micro-batches ahead of its neighbour than are in
    flight, so a send older than twice that has been received: waiting for it frees its memory and never blocks.
    """

    in_flight: int
    posted: dict[Message, tuple[torch.Tensor, Waited]] = field(default_factory=dict)
    local: dict[Message, torch.Tensor] = field(default_factory=dict)
    sent: dict[Kind, deque[tuple[torch.Tensor, Waited]]] = field(
        default_factory=lambda: {kind: deque() for kind in Kind})

    def keep(self, kind: Kind, x: torch.Tensor, work: Waited) -> None:
        """Holds on to a tensor that is being sent, and lets go of one that has long arrived."""
        self.sent[kind].append((x, work))
        if len(self.sent[kind]) > 2 * self.in_flight:
            self.sent[kind].popleft()[1].wait()

    def drain(self) -> None:
        """Waits for the sends of a whole step."""
        for under_way in self.sent.values():
            while under_way:
                under_way.popleft()[1].wait()


class Executor:
    """Runs forward and backward passes of one rank's chunks over the micro-batches of a step."""

    def __init__(self, chunks: Sequence[Chunk], mesh: Mesh, schedule: str) -> None:
        self.chunks = chunks
        self.mesh = mesh
        self.stages = mesh.size("pp")
        self.last_stage = self.stages * len(chunks) - 1
        virtual = len(chunks)
        self.schedule = lru_cache(8)(lambda micros: build_schedule(schedule, self.stages, virtual, micros)[mesh.pp])
        self.forward_schedule = lru_cache(8)(lambda micros: forward_only(self.stages, virtual, micros)[mesh.pp])

    def train(self, micros: Sequence[MicroBatch], total: int) -> torch.Tensor:
        """Forward and backward of a step; gradients are left, summed over dp, in the buckets.

        The loss is divided by `total`, the supervised tokens of the global batch.
        Returns the sum of this rank's token losses (0 but on the last stage), on the device, without gradient.
        """
        for chunk in self.chunks:
            assert chunk.buckets is not None
            chunk.buckets.start_step()
        run = _Run(self, micros, total)
        run.execute(self.schedule(len(micros)))
        for chunk in self.chunks:
            assert chunk.buckets is not None
            chunk.buckets.finish()
        return run.loss

    @torch.no_grad()
    def evaluate(self, micros: Sequence[MicroBatch]) -> torch.Tensor:
        """The sum of this rank's token losses (0 but on the last stage), forward only."""
        run = _Run(self, micros, 1)
        run.execute(self.forward_schedule(len(micros)))
        return run.loss


class _Run:
    """The state of one step: activations alive, messages under way, the loss so far."""

    def __init__(self, executor: Executor, micros: Sequence[MicroBatch], total: int) -> None:
        self.executor = executor
        self.micros = micros
        self.total = total
        self.traffic = _Traffic(in_flight=executor.last_stage + 2)
        self.inputs: dict[tuple[int, int], torch.Tensor] = {}
        self.outputs: dict[tuple[int, int], torch.Tensor] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=micros[0].tokens.device)

    def execute(self, actions: Sequence[Action]) -> None:
        """Runs this rank's actions in order, posting each action's receive while the one before it computes."""
        last_backward = {action.chunk: i for i, action in enumerate(actions) if action.kind is Kind.B}
        for i, action in enumerate(actions):
            self._post(action)
            if i + 1 < len(actions):
                self._post(actions[i + 1])
            if action.kind is Kind.F:
                self._forward(action)
            else:
                buckets = self.executor.chunks[action.chunk].buckets
                if last_backward[action.chunk] == i and buckets is not None:
                    buckets.expect_last_backward()
                self._backward(action)
        self.traffic.drain()

    def _forward(self, action: Action) -> None:
        self.executor.mesh.heart.enter(Phase.FORWARD if torch.is_grad_enabled() else Phase.EVALUATION)
        chunk = self.executor.chunks[action.chunk]
        key, micro = (action.micro, action.chunk), self.micros[action.micro]
        if chunk.stage == 0:
            x = micro.tokens
        else:
            x = self._receive(Kind.F, action.micro, chunk.stage).requires_grad_(torch.is_grad_enabled())
        y = chunk.model(x, micro)
        if not chunk.model.last:
            self._send(Kind.F, action.micro, chunk.stage + 1, y.detach())
        elif not torch.is_grad_enabled():
            self.loss += chunk.model.losses(y, _labels(micro)).sum()
        if torch.is_grad_enabled():
            self.inputs[key], self.outputs[key] = x, y

    def _backward(self, action: Action) -> None:
        self.executor.mesh.heart.enter(Phase.BACKWARD)
        chunk = self.executor.chunks[action.chunk]
        key = (action.micro, action.chunk)
        x, y = self.inputs.pop(key), self.outputs.pop(key)
        if chunk.model.last:  # the head computes loss and gradients together, so it runs now
            losses, grad = chunk.model.loss(y.detach(), _labels(self.micros[action.micro]), 1.0 / self.total)
            self.loss += losses.sum()
        else:
            grad = self._receive(Kind.B, action.micro, chunk.stage)
        torch.autograd.backward(y, grad)
        if chunk.stage > 0:
            assert x.grad is not None
            self._send(Kind.B, action.micro, chunk.stage - 1, x.grad)

    def _needs(self, action: Action) -> bool:
        """Whether the action waits for a message from another stage."""
        stage = self.executor.chunks[action.chunk].stage
        return stage > 0 if action.kind is Kind.F else stage < self.executor.last_stage

    def _post(self, action: Action) -> None:
        """Posts the receive that an action will wait for."""
        stage = self.executor.chunks[action.chunk].stage
        message = (action.kind, action.micro, stage)
        if self.executor.stages == 1 or not self._needs(action) or message in self.traffic.posted:
            return
        source = stage - 1 if action.kind is Kind.F else stage + 1
        buffer = self.executor.chunks[action.chunk].model.boundary(*self.micros[action.micro].tokens.shape)
        rank, group = self._channel(action.kind, source, stage)
        work = dist.irecv(buffer, src=rank, group=group)
        assert work is not None
        self.traffic.posted[message] = (buffer, Waited(work, self.executor.mesh.heart))

    def _receive(self, kind: Kind, micro: int, stage: int) -> torch.Tensor:
        """What another stage sent to `stage` for a micro-batch."""
        if self.executor.stages == 1:
            return self.traffic.local.pop((kind, micro, stage))
        buffer, work = self.traffic.posted.pop((kind, micro, stage))
        work.wait()
        return buffer

    def _send(self, kind: Kind, micro: int, stage: int, x: torch.Tensor) -> None:
        """Hands a tensor to global stage `stage`."""
        if self.executor.stages == 1:
            self.traffic.local[kind, micro, stage] = x
            return
        source = stage - 1 if kind is Kind.F else stage + 1
        rank, group = self._channel(kind, source, stage)
        x = x.contiguous()
        work = dist.isend(x, dst=rank, group=group)
        assert work is not None
        self.traffic.keep(kind, x, Waited(work, self.executor.mesh.heart))

    def _channel(self, kind: Kind, source: int, target: int) -> tuple[int, dist.ProcessGroup]:
        """The peer's global rank and the group of one direction between two stages."""
        mesh, stages = self.executor.mesh, self.executor.stages
        low, high = (source, target) if kind is Kind.F else (target, source)
        a, b = mesh.peer(pp=low % stages), mesh.peer(pp=high % stages)
        group = mesh.channels[f"{'ahead' if kind is Kind.F else 'back'}:{a}>{b}"]
        here = mesh.rank
        return (b if here == a else a), group


def _labels(micro: MicroBatch) -> torch.Tensor:
    assert micro.labels is not None
    return micro.labels


def make_chunks(mesh: Mesh, virtual: int, build: Callable[[int], tuple[Stage, GradientBuckets | None]]) -> list[Chunk]:
    """This rank's chunks: chunk c is global stage c * pp + this rank's pp coordinate."""
    stages = [stage_of(mesh.pp, chunk, mesh.size("pp")) for chunk in range(virtual)]
    return [Chunk(*build(stage), stage) for stage in stages]
