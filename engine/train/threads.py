"""How many threads a rank computes with on a CPU, and whether they spin while they wait.

torch's wheels carry GNU's OpenMP, which reads its environment when it is loaded: what is settled here must be settled
before torch is imported, so this module imports none of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import UserError
from engine.train.place import Place, place_from_environment

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")
"""What a user sets besides OMP_NUM_THREADS to have it another way; the last two are Intel's."""
GPU = Path("/dev/nvidiactl")
"""Is there where the driver of a GPU is: torch, which would know better, is not to be imported yet."""


def share_cores(argv: Sequence[str], recipe: Sequence[str] = ()) -> None:
    """Sets this process's OpenMP for the layout that its flags ask for; those of a recipe lie beneath them."""
    os.environ.update(openmp(argv, recipe, os.environ, cores_here()))


def openmp(argv: Sequence[str], recipe: Sequence[str], env: Mapping[str, str], cores: int) -> dict[str, str]:
    """What OpenMP is told: nothing, but for ranks of one machine that are stages of a pipeline.

    A stage that waits for another leaves its cores idle. So each may use twice its share of them, and its threads sleep
    where they wait: spinning, they would take the cores from the stage that works. Measured with 2 stages on 2 cores
    (benchmarks/train_step.py); more than twice the share was not.
    """
    try:
        place = place_from_environment(env)
        share = cores // place.local_world
        if place.world == 1 or not place.one_machine or share == 0 or _number_set(env) or any(map(env.get, WAITING)):
            return {}
        stages, device = _asked(argv, recipe)
    except (UserError, OSError):  # the run itself will say what is wrong
        return {}
    if stages == 1 or device == "cuda" or (device == "auto" and GPU.exists()):
        return {}
    return {"OMP_NUM_THREADS": str(2 * share), "OMP_WAIT_POLICY": "passive"}


def cores_here() -> int:
    """The cores that this process may use; all of the machine where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(place: Place, env: Mapping[str, str], cores: int) -> int | None:
    """The threads that a rank shall compute with: its share of the machine's cores. None where OpenMP's own number
    stands: alone, or as it was set."""
    if place.local_world == 1 or _number_set(env):
        return None
    return max(1, cores // place.local_world)


def _number_set(env: Mapping[str, str]) -> bool:
    """Whether somebody has set the number of threads. torchrun sets 1 where nobody has, which wastes cores."""
    number = env.get("OMP_NUM_THREADS")
    return bool(number) and not (number == "1" and "TORCHELASTIC_RUN_ID" in env)


def _asked(argv: Sequence[str], recipe: Sequence[str]) -> tuple[int, str]:
    """--pp and --device as the run will have them: a resumed run's are those of its folder unless flags say otherwise.
    A config on standard input can be read once only, by the run."""
    from engine.config.flags import parse_given, parse_values
    from engine.train.request import take_switches

    words = take_switches(argv)[1]
    if "-" in words or "--config=-" in words:
        return 1, "auto"
    under, given = parse_values(recipe), parse_given(words).values
    asked = {**under, **given}
    saved = Path(str(asked.get("out", ""))) / "config.yaml"
    if (asked.get("resume") or asked.get("resume_from") is not None) and saved.is_file():
        asked = {**under, **parse_given(["--config", str(saved)]).values, **given}
    return int(asked.get("pp", 1)), str(asked.get("device", "auto"))
