"""What `--recompute auto` is: the least that has to be made again for a run to fit its devices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from engine.config import Layout, RunConfig
from engine.config.recompute import FULL, NONE, SELECTIVE, Recompute
from engine.kernels.dispatch import Kernels
from engine.plan.capacity import Capacity
from engine.plan.estimate import Plan, estimate
from engine.plan.trace import Tracer
from engine.plan.units import bytes_text


def with_recompute(config: RunConfig, recompute: Recompute) -> RunConfig:
    """The config with a `--recompute` that has been decided."""
    return replace(config, runtime=replace(config.runtime, recompute=str(recompute)))


def least_recompute(config: RunConfig, layout: Layout, dtype: torch.dtype, kernels: Kernels,
                    capacity: Capacity | None, tracer: Tracer | None = None) -> tuple[Plan, str]:
    """The plan of a run with the least recomputation that fits, and what was chosen and why, in one line. In this
    order: none, selective, then whole blocks, as few of each stage as will do. Where nothing fits it is the plan that
    needs the least.

    `capacity` is None where the run's devices are not here: the plan is then one without recomputation. `tracer` may be
    shared, to save work.
    """
    plans = _Plans(config, layout, dtype, kernels, tracer or Tracer())
    if capacity is None:
        needs = ", ".join(f"{bytes_text(plans.need(known))} with {known}" for known in (NONE, SELECTIVE, FULL))
        return plans.of(NONE), ("--recompute auto takes the least that fits the run's GPUs, and none is here: each "
                                f"would need {needs}")
    rung = _least_rung(plans, capacity.usable(layout))
    found = Recompute.of_rung(rung) if rung < plans.top else FULL
    why = f"the fullest rank needs {bytes_text(plans.need(found))}"
    if rung:
        less = Recompute.of_rung(rung - 1)
        why += f", and {bytes_text(plans.need(less))} with {less}"
    return plans.of(found), f"--recompute auto takes {found}: {why}; {capacity.text(layout)}"


def _least_rung(plans: _Plans, usable: int) -> int:
    """The first rung that fits, else the one that needs the least.

    What is kept falls with every block that is run again, but each such block leaves its input beside the one that is
    run again at the moment: so the need falls from rung to rung, and at the end may rise.
    """
    low, high = 0, plans.top  # the first that fits, or is followed by none that needs less, is in [low, high]
    while low < high:
        middle = (low + high) // 2
        need = plans.need(Recompute.of_rung(middle))
        if need <= usable or plans.need(Recompute.of_rung(middle + 1)) >= need:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class _Plans:
    """The plans that are compared, each made once."""

    config: RunConfig
    layout: Layout
    dtype: torch.dtype
    kernels: Kernels
    tracer: Tracer
    made: dict[Recompute, Plan] = field(default_factory=dict)

    @property
    def top(self) -> int:
        """The rung from which on every block of the longest stage is run again."""
        return Recompute(max(stage.layers for stage in self.of(FULL).stages), selective=True).rung

    def of(self, recompute: Recompute) -> Plan:
        """The plan with so much recomputation."""
        if recompute not in self.made:
            self.made[recompute] = estimate(with_recompute(self.config, recompute), self.layout, self.dtype,
                                            self.tracer, self.kernels)
        return self.made[recompute]

    def need(self, recompute: Recompute) -> int:
        """Bytes that the fullest rank needs with it."""
        return self.of(recompute).heaviest.memory.total
