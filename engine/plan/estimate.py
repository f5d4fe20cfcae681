"""What a layout asks of each rank, without any of its devices: the real modules are built on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from engine.config import Layout, RunConfig
from engine.config.presets import title
from engine.config.recompute import NONE, read_recompute
from engine.kernels.dispatch import Kernels
from engine.model import Decoder, Parts
from engine.parallel.buckets import GradientBuckets, Replicas
from engine.parallel.collectives import TensorParallel
from engine.parallel.schedule import Action, Kind, Schedule, build_schedule, stage_of
from engine.parallel.simulator import simulate
from engine.plan.flops import balanced_stages, flops_per_token, layer_attention, layer_matrices, parameters
from engine.plan.trace import META, Activations, Shape, Tracer
from engine.plan.units import bytes_text, count_text, flops_text, table


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: int = 0
    """Parameters in the model's dtype, run-time padding included."""
    gradients: int = 0
    """Main gradients: fp32 (fp64 for fp64), and this rank's dp part of their sum where dp > 1."""
    optimizer: int = 0
    """Both moments, and master weights where parameters are narrower than fp32; a dp-th of them."""
    activations: int = 0
    """Kept from forward to backward by the micro-batches in flight."""
    working: int = 0
    """On top at the worst moment of a pass, and the messages under way between stages."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __str__(self) -> str:
        return " + ".join(f"{part.name} {bytes_text(getattr(self, part.name))}" for part in fields(self))


@dataclass(frozen=True)
class StagePlan:
    """One pipeline rank: its layers (over all its chunks), local parameters, micro-batches in flight, memory."""

    rank: int
    layers: int
    parameters: int
    in_flight: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run in one layout."""

    config: RunConfig
    layout: Layout
    dtype: torch.dtype
    parameters: int
    """Of the whole model."""
    flops_per_token: float
    tokens_per_step: int
    micro_batches: int
    """Micro-batches of one dp rank in a step: the accumulation."""
    bubble: float
    """Idle part of the pipeline in a step, 0 to 1."""
    stages: tuple[StagePlan, ...]

    @property
    def heaviest(self) -> StagePlan:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def copied(self) -> int:
        """Bytes of main memory for the copy that the fullest rank makes of its state, to write it while training goes
        on; 0 where the run only saves when it waits."""
        save = self.config.save
        if not save.out or not save.save_every or save.save_wait:
            return 0
        return max(stage.memory.weights // self.layout.dp + stage.memory.optimizer for stage in self.stages)

    def report(self) -> str:
        """A few aligned lines: the derived numbers, then the memory of one rank of each stage."""
        batch, model = self.config.batch, self.config.model
        accumulation = f"{self.micro_batches} micro-batches of {batch.micro_batch} x {batch.seq_len} on each dp rank"
        processes = f"{self.layout.world} process{'es' * (self.layout.world > 1)}"
        recompute = read_recompute(self.config.runtime.recompute)
        again = [("recompute", f"{recompute}, in the backward pass")] * (recompute != NONE)
        facts = [
            ("layout", f"{self.layout} · {processes} · {self.config.parallel.schedule}"),
            ("model", f"{title(model)}: {count_text(self.parameters)} parameters, {str(self.dtype).split('.')[-1]}"),
            ("FLOPs a token", f"{flops_text(self.flops_per_token)} (forward and backward, causal attention)"),
            ("tokens a step", f"{self.tokens_per_step:,} in {accumulation}"),
            ("bubble", f"{self.bubble:.1%} of a step"), *again,
        ]
        if self.copied:
            facts.append(("saving", f"checkpoints are written from a copy of {bytes_text(self.copied)} a rank in main "
                                    "memory; --save-wait takes none"))
        width = max(len(name) for name, _ in facts)
        lines = [f"{name:<{width}}  {text}" for name, text in facts]
        return "\n".join([*lines, "memory of one rank of each stage:", *self._stage_table()])

    def _stage_table(self) -> list[str]:
        parts = [part.name for part in fields(Memory)]
        rows = [["stage", "layers", "parameters", *parts, "total"]]
        for s in self.stages:
            sizes = [bytes_text(getattr(s.memory, part)) for part in parts]
            rows.append([str(s.rank), str(s.layers), count_text(s.parameters), *sizes, bytes_text(s.memory.total)])
        return table(rows)


def estimate(config: RunConfig, layout: Layout, dtype: torch.dtype, tracer: Tracer | None = None,
             kernels: Kernels | None = None) -> Plan:
    """The plan of a run in a layout with `kernels` (torch's if not given); `tracer` may be shared between estimates to
    save work.

    Takes tp rank 0 for all: padding is part of every rank's matrices, so tp ranks of a stage are alike. Raises
    UserError for a schedule that cannot run these numbers.
    """
    batch, par = config.batch, config.parallel
    micros = batch.global_batch // (batch.micro_batch * layout.dp)
    schedule = build_schedule(par.schedule, layout.pp, par.virtual_stages, micros)
    shape = Shape(model=config.model, dtype=dtype, tp=layout.tp, sequence_parallel=par.sequence_parallel,
                  recompute=read_recompute(config.runtime.recompute), kernels=kernels or _torch_kernels(config),
                  micro_batch=batch.micro_batch, seq_len=batch.seq_len)
    spans = balanced_stages(config, layout.pp * par.virtual_stages)
    planner = _Planner(shape, layout, spans, tracer or Tracer())
    stages = tuple(planner.stage(rank, actions) for rank, actions in enumerate(schedule))
    return Plan(config, layout, dtype, parameters(config.model), flops_per_token(config.model, batch.seq_len),
                batch.global_batch * batch.seq_len, micros, _bubble(shape, schedule, spans), stages)


def _torch_kernels(config: RunConfig) -> Kernels:
    """PyTorch's kernels, with the attention the config asks for."""
    return Kernels(attention="reference" if config.runtime.attention == "reference" else "sdpa")


def _bubble(shape: Shape, schedule: Schedule, spans: Sequence[range]) -> float:
    """Idle part of the pipeline when each chunk takes its FLOPs: uneven layers and the head's stage show."""
    model = shape.model
    layer = 2.0 * layer_matrices(model) + layer_attention(model, shape.seq_len)
    times = [len(layers) * layer for layers in spans]
    times[-1] += 2.0 * model.vocab_size * model.hidden
    again = [min(shape.recompute.blocks, len(layers)) * layer for layers in spans]  # of whole blocks alone
    return simulate(schedule, times, [2.0 * time + more for time, more in zip(times, again, strict=True)]).bubble


@dataclass
class _Planner:
    """What every stage of one layout shares."""

    shape: Shape
    layout: Layout
    spans: Sequence[range]
    tracer: Tracer

    def stage(self, rank: int, actions: Sequence[Action]) -> StagePlan:
        """The plan of one pipeline rank, which runs `actions`."""
        virtual = len(self.spans) // self.layout.pp
        numbers = [stage_of(rank, chunk, self.layout.pp) for chunk in range(virtual)]
        chunks = [self._activations(number) for number in numbers]
        states = [self._states(number) for number in numbers]
        kept, in_flight = _peak(actions, chunks)
        moving = Memory(activations=kept, working=max(chunk.working for chunk in chunks) + self._messages())
        return StagePlan(rank, sum(len(self.spans[n]) for n in numbers), sum(count for count, _ in states), in_flight,
                         sum((memory for _, memory in states), moving))

    def _ends(self, number: int) -> tuple[bool, bool]:
        return number == 0, number == len(self.spans) - 1

    def _activations(self, number: int) -> Activations:
        return self.tracer.chunk(self.shape, len(self.spans[number]), *self._ends(number))

    def _messages(self) -> int:
        """Two receives posted ahead, one each way: the executor posts an action's message one action early."""
        if self.layout.pp == 1:
            return 0
        tokens = self.shape.micro_batch * self.shape.seq_len
        split = self.shape.tp if self.shape.sequence_parallel else 1
        return 2 * tokens * self.shape.model.hidden * self.shape.dtype.itemsize // split

    def _states(self, number: int) -> tuple[int, Memory]:
        """Local parameters of a chunk, and the memory of its states: what its own buckets would allocate."""
        tp = TensorParallel(None, 0, self.layout.tp, self.shape.sequence_parallel)
        first, last = self._ends(number)
        model = Decoder(Parts(self.shape.model, tp, self.shape.dtype, META), self.spans[number], first=first, last=last)
        count = sum(p.numel() for p in model.parameters())
        dp = self.layout.dp
        memory = Memory()
        for bucket in GradientBuckets(model, {"dp": Replicas(size=dp)}).buckets:
            shard = bucket.grads.nbytes // dp
            master = bucket.data.dtype != bucket.grads.dtype
            memory += Memory(weights=bucket.data.nbytes, gradients=bucket.grads.nbytes + (shard if dp > 1 else 0),
                             optimizer=(3 if master else 2) * shard)
        return count, memory


def _peak(actions: Sequence[Action], chunks: Sequence[Activations]) -> tuple[int, int]:
    """The most bytes of activations alive on one rank, and the most micro-batch passes they belong to."""
    live = peak = passes = most = 0
    for action in actions:
        sign = 1 if action.kind is Kind.F else -1
        live += sign * chunks[action.chunk].kept
        passes += sign
        peak, most = max(peak, live), max(most, passes)
    return peak, most
