"""One `--recompute auto` for all ranks: their machines may differ, or have other work to do."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.config.recompute import AUTO, Recompute, read_recompute
from engine.mesh import Mesh
from engine.plan import estimate, with_recompute
from engine.train.job import Job


def settled(job: Job, mesh: Mesh) -> Job:
    """The job with a plan that is the same on every rank, which all call this: the ranks of a tensor-parallel group
    compute again together, and the rank with the least memory decides for all."""
    world = mesh.group("world")
    if job.config.runtime.recompute != AUTO or world is None:
        return job
    mine = read_recompute(job.plan.config.runtime.recompute)
    most = torch.tensor(mine.rung, dtype=torch.int64, device=job.device)
    world.all_reduce_(most, "max")
    found = Recompute.of_rung(int(most))
    if found == mine:
        return job
    plan = estimate(with_recompute(job.config, found), job.layout, job.dtype, kernels=job.kernels)
    return replace(job, plan=plan, notes=[*job.notes, f"--recompute auto takes {found} in the end: another rank has "
                                                      "less memory than this one"])
