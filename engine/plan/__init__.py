"""What a run will need, before it starts: parameters, FLOPs, memory and idle time of any layout."""

from engine.plan.capacity import Capacity, capacity_of
from engine.plan.estimate import Memory, Plan, StagePlan, estimate
from engine.plan.fit import require_memory
from engine.plan.flops import balanced_stages, flops_of, flops_per_token, parameters, peak_flops
from engine.plan.recompute import least_recompute, with_recompute

__all__ = [
    "Capacity",
    "Memory",
    "Plan",
    "StagePlan",
    "balanced_stages",
    "capacity_of",
    "estimate",
    "flops_of",
    "flops_per_token",
    "least_recompute",
    "parameters",
    "peak_flops",
    "require_memory",
    "with_recompute",
]
