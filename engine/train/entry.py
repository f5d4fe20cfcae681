"""The frame of an entry point: switches, preparation, the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.config import RunConfig, describe
from engine.data.fingerprint import Fingerprint
from engine.train.job import prepare, take_switches
from engine.train.launch import place_from_environment, run_rank, tune_allocator
from engine.train.run import MakeFeed, run


def enter(module: str, argv: Sequence[str], recipe: Sequence[str], defaults: Mapping[str, Any],
          check_data: Callable[[RunConfig], Fingerprint], make_feed: MakeFeed) -> int:
    """Runs one rank of an entry point and returns its exit code: 0, 1 for a crash, 2 for bad input."""

    tune_allocator()

    def body() -> int:
        switches, flags = take_switches([*recipe, *argv])
        if switches.help:
            print(f"torchrun [--nproc-per-node N] -m {module} [options]\n"
                  "  --dry-run [--world-size N]  check every rule and print layout and memory, then stop\n\n"
                  f"{describe()}")
            return 0
        switches, flags = take_switches(argv)
        place = place_from_environment()
        job = prepare(flags, recipe, defaults, place, switches, check_data)
        if switches.check:
            return 0
        if switches.dry_run:
            if place.rank == 0:
                print(job.plan.report())
            return 0
        return run(job, place, make_feed)

    return run_rank(body)
