"""Does it fit, and what would: planned before any process group exists, and said in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from engine.config import Layout, RunConfig, check
from engine.config.presets import title
from engine.config.recompute import FULL, SELECTIVE, read_recompute
from engine.errors import UserError
from engine.kernels.language import wide
from engine.plan.capacity import Capacity, gpu_that_holds
from engine.plan.estimate import Plan, estimate
from engine.plan.recompute import with_recompute
from engine.plan.trace import Tracer
from engine.plan.units import bytes_text

TRY_HERE = "bash examples/pretrain_tiny.sh"
NODE = 8
"""Largest tp that is proposed: tensor parallelism wants the fast links inside one machine."""
MOST_RANKS = 1024
"""Largest number of devices that is tried."""
DEVICES = (24, 48, 80, 141, 192, 288)
"""Memory of common GPUs, in GB."""


def require_memory(plan: Plan, capacity: Capacity) -> None:
    """Raises UserError when the plan's fullest rank needs more than a run may plan with on its device."""
    heaviest = plan.heaviest
    if heaviest.memory.total <= capacity.usable(plan.layout):
        _require_copy(plan, capacity)
        return
    count = plan.layout.world
    where = "one process" if count == 1 else f"the fullest of {count} processes ({plan.layout}, stage {heaviest.rank})"
    model = title(plan.config.model)
    tracer = Tracer()
    holders = [text for text in (_single(plan, tracer), _several(plan, capacity, tracer)) if text is not None]
    raise UserError(". ".join([
        f"training {model} in {str(plan.dtype).split('.')[-1]} needs {bytes_text(heaviest.memory.total)} on {where}; "
        f"{capacity.text(plan.layout)}",
        f"The estimate: {heaviest.memory}",
        f"What would hold it: {', or '.join(holders)}" if holders else
        f"No layout of up to {MOST_RANKS} such devices holds it; lower --seq-len, or take a smaller --model",
        f"To try the whole chain here: {TRY_HERE}",
    ]))


def _require_copy(plan: Plan, capacity: Capacity) -> None:
    """Raises UserError when main memory does not hold what checkpoints are written from."""
    left = capacity.main if capacity.gpu else capacity.total - plan.heaviest.memory.total
    if left is not None and plan.copied > left:
        raise UserError("checkpoints are written while training goes on, from a copy of the state: "
                        f"{bytes_text(plan.copied)} on the fullest rank; main memory has {bytes_text(left)} left for "
                        "it. Add --save-wait, which takes no copy")


def _single(plan: Plan, tracer: Tracer) -> str | None:
    """The smallest common GPU that holds the whole model by itself, if any does."""
    for config in _recomputing(plan.config):
        found = _try(config, 1, 1, 1, plan.dtype, tracer)
        if found is None:
            continue
        need = found.heaviest.memory.total
        size = next((size for size in DEVICES if gpu_that_holds(need, Layout()) <= size * 10**9), None)
        if size is not None:
            return f"one GPU of {size} GB ({_flags(plan.config, config, Layout(), need)})"
    return None


def _several(plan: Plan, capacity: Capacity, tracer: Tracer) -> str | None:
    """The smallest number of such devices that holds the model, and the flags for them."""
    for world, tp, pp in _layouts():
        layout = Layout(pp=pp, dp=world // (tp * pp), tp=tp)
        usable = capacity.usable(layout)
        if states_at_least(plan.parameters, plan.dtype, layout) > usable:
            continue  # most layouts end here, which spares building them
        for config in _recomputing(plan.config):
            found = _try(config, world, tp, pp, plan.dtype, tracer)
            if found is not None and found.heaviest.memory.total <= usable:
                devices = "this one device" if world == 1 else f"{world} devices like this one"
                return f"{devices} ({_flags(plan.config, config, found.layout, found.heaviest.memory.total)})"
    return None


def states_at_least(parameters: int, dtype: torch.dtype, layout: Layout) -> float:
    """Bytes of weights, gradients and optimizer of the average rank, padding and copies left out."""
    gradient = wide(dtype).itemsize
    sharded = (3 if dtype != wide(dtype) else 2) + (1 if layout.dp > 1 else 0)
    each = dtype.itemsize + gradient + gradient * sharded / layout.dp
    return parameters * each / (layout.tp * layout.pp)


def _layouts() -> Iterator[tuple[int, int, int]]:
    """(world, tp, pp), few devices first, and of one number the layout with the least model parallelism first."""
    world = 1
    while world <= MOST_RANKS:
        sizes = [2**i for i in range(world.bit_length())]
        shapes = [(tp, pp) for pp in sizes for tp in sizes if tp <= NODE and tp * pp <= world]
        for tp, pp in sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape[1])):
            yield world, tp, pp
        world *= 2


def _recomputing(config: RunConfig) -> Iterator[RunConfig]:
    """The config as it is, then with more recomputation."""
    yield config
    for more in (SELECTIVE, FULL):
        if read_recompute(config.runtime.recompute).rung < more.rung:
            yield with_recompute(config, more)


def _try(config: RunConfig, world: int, tp: int, pp: int, dtype: torch.dtype, tracer: Tracer) -> Plan | None:
    """The estimate for a layout, or None where the rules forbid it (its step may be cut short)."""
    config = replace(config, parallel=replace(config.parallel, tp=tp, pp=pp, virtual_stages=1, schedule="1f1b"))
    try:
        layout = check(config, world)
    except UserError:
        return None
    # 1F1B never holds more than pp micro-batches: more of them only make the schedule longer to plan.
    most = config.batch.micro_batch * layout.dp * pp
    batch = replace(config.batch, global_batch=min(config.batch.global_batch, most))
    return estimate(replace(config, batch=batch), layout, dtype, tracer)


def _flags(asked: RunConfig, config: RunConfig, layout: Layout, need: int) -> str:
    """The flags that lead from nothing to a layout, and what it then needs."""
    flags = [f"--{axis} {getattr(layout, axis)}" for axis in ("tp", "pp") if getattr(layout, axis) > 1]
    if config.runtime.recompute != asked.runtime.recompute:
        flags.append(f"--recompute {config.runtime.recompute}")
    if flags and layout.dp > 1:
        flags.append(f"and dp {layout.dp}")
    each = f"{bytes_text(need)}{' each' if layout.world > 1 else ''}"
    return f"with {' '.join(flags)}: {each}" if flags else each
