"""Who this process is among the others, as its launcher says: torchrun, mpirun or srun.

RANK and WORLD_SIZE win, then MPI's own variables, then a Slurm step's. A launcher that says several processes and
does not say which this is would start as many runs of one process: that is refused.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.errors import UserError, shown

HERE = "127.0.0.1"
"""Where ranks of one machine meet."""
DEFAULT_PORT = 29500
"""torchrun's, where nothing tells two runs of one machine apart."""
FIRST_PORT, PORTS = 20000, 10000
"""Ports for runs that mpirun or srun started: below those that systems hand out by themselves."""


@dataclass(frozen=True)
class Place:
    """This process among the others. `host` and `port` are where the ranks meet; `job` tells this run from another
    one that meets there by mistake; `agent` is set where torchrun's agent keeps the store."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str = HERE
    port: int = DEFAULT_PORT
    job: str = ""
    agent: bool = False

    @property
    def one_machine(self) -> bool:
        """Whether all ranks are on this machine, as far as the launcher tells."""
        return self.local_world == self.world


@dataclass(frozen=True)
class Family:
    """The variables of one kind of launcher. Of `local_rank` and `local_world`, the first that is set counts."""

    launcher: str
    rank: str
    world: str
    local_rank: Sequence[str]
    local_world: Sequence[str]


TORCHRUN = Family("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
MPI = (
    Family("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",),
           ("OMPI_COMM_WORLD_LOCAL_SIZE",)),  # Open MPI
    Family("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",),
           ("MV2_COMM_WORLD_LOCAL_SIZE",)),  # MVAPICH2
    Family("mpirun", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
           ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),  # MPICH, Intel MPI; Cray
)
SLURM = Family("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), ())


def place_from_environment(env: Mapping[str, str] = os.environ) -> Place:
    """One process alone where no launcher has set anything. Raises UserError for what contradicts itself."""
    if not (env.get("RANK") or env.get("WORLD_SIZE")):
        return _from_launcher(env) or Place(0, 1, 0, 1)
    place = _from_rank(env)
    started = None if "TORCHELASTIC_RUN_ID" in env else _from_launcher(env)
    if started is None:
        return place
    _same(place, started)
    if place.world == started.world and not (env.get("LOCAL_RANK") or env.get("LOCAL_WORLD_SIZE")):
        return replace(place, local_rank=started.local_rank, local_world=started.local_world)
    return place


def _from_rank(env: Mapping[str, str]) -> Place:
    """RANK and WORLD_SIZE, from torchrun or from the user's own script; such a script often leaves the local ones out,
    and then means one process a machine."""
    rank, world = _pair(env, TORCHRUN)
    local_rank = _number(env, TORCHRUN.local_rank)
    local_world = _number(env, TORCHRUN.local_world)
    if local_world is not None and local_world < world and not env.get("MASTER_ADDR"):
        raise UserError(f"LOCAL_WORLD_SIZE={local_world} of WORLD_SIZE={world}: the ranks are on several machines; set "
                        "MASTER_ADDR to the machine of rank 0")
    place = _checked(env, TORCHRUN, rank, world, local_rank or 0, local_world or (local_rank or 0) + 1)
    job = env.get("TORCHELASTIC_RUN_ID", "") + "/" + env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return replace(_meeting_point(env, place, HERE), job=job, agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _from_launcher(env: Mapping[str, str]) -> Place | None:
    """What mpirun or srun says; None where neither has started several processes."""
    step = _slurm_step(env)
    for family in MPI:
        if env.get(family.rank) or env.get(family.world):
            place = _from_mpi(env, family)
            # srun sets PMI_* too, and knows the machines. An mpirun inside a step starts ranks of its own: there
            # Slurm's variables are those of mpirun's helpers.
            if step is not None and (step.rank, step.world) == (place.rank, place.world):
                return step
            return place if place.world > 1 else None
    return step


def _from_mpi(env: Mapping[str, str], family: Family) -> Place:
    rank, world = _pair(env, family)
    local_rank, local_world = _number(env, family.local_rank), _number(env, family.local_world)
    if local_world is not None and local_world < world and not env.get("MASTER_ADDR"):
        raise UserError(f"{family.launcher} has started {world} processes, {local_world} of them on this machine: set "
                        "MASTER_ADDR to the machine of rank 0 (mpirun -x MASTER_ADDR=...)")
    # A launcher that says nothing of machines has most likely started all on this one.
    place = _checked(env, family, rank, world, rank if local_rank is None else local_rank,
                     world if local_world is None else local_world)
    name = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMI_JOBID", "")
    return _meeting_point(env, replace(place, job=name), HERE)


def _slurm_step(env: Mapping[str, str]) -> Place | None:
    """The step of srun that this process is a task of. sbatch sets SLURM_PROCID and SLURM_NTASKS for a plain command
    too, which is one process: only a step's own number of tasks counts."""
    if (_number(env, [SLURM.world]) or 1) <= 1:
        return None
    rank, world = _pair(env, SLURM)
    found = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if env.get(name)),
                 None)
    nodes = expand_nodes(env[found], found) if found else []
    local_rank = _number(env, SLURM.local_rank)
    if len(nodes) == 1:
        local_rank, local_world = rank if local_rank is None else local_rank, world
    elif local_rank is None:
        raise UserError(f"SLURM_STEP_NUM_TASKS={world} is set and SLURM_LOCALID is not; start with srun")
    else:
        local_world = _tasks_here(env) or local_rank + 1
    host = HERE if len(nodes) == 1 else nodes[0] if nodes else ""
    if env.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") and len(nodes) > 1:
        host = ""  # then rank 0 may be on any node
    if not host and not env.get("MASTER_ADDR"):
        raise UserError(f"SLURM_STEP_NUM_TASKS={world}, and no list of nodes tells where rank 0 is; set MASTER_ADDR to "
                        "its machine")
    numbers = [env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    place = _checked(env, SLURM, rank, world, local_rank, local_world)
    return _meeting_point(env, replace(place, job=".".join(numbers) if any(numbers) else ""), host)


def _tasks_here(env: Mapping[str, str]) -> int | None:
    """This node's part of SLURM_STEP_TASKS_PER_NODE, as in `4(x2),3`."""
    counts: list[int] = []
    for word in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", word)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, ["SLURM_NODEID"])
    return counts[node] if node is not None and node < len(counts) else None


def expand_nodes(text: str, name: str = "SLURM_STEP_NODELIST") -> list[str]:
    """The hosts of a Slurm node list: `a[01-03,07],b1` is a01, a02, a03, a07, b1. Raises UserError where it is none."""
    words = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(words) != text.strip():
        raise UserError(f"{name}={shown(text)!r} in the environment is not a list of nodes")
    return [host for word in words for host in _expand(word.strip(), name)]


def _expand(word: str, name: str) -> list[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        return [word]
    inside, _, tail = rest.partition("]")
    hosts: list[str] = []
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and 0 <= int(last) - int(first) < 100_000):
            raise UserError(f"{name}: {shown(part)!r} is not a range of nodes")
        hosts += [f"{head}{number:0{len(first)}}{more}" for number in range(int(first), int(last) + 1)
                  for more in _expand(tail, name)]
    return hosts


def _pair(env: Mapping[str, str], family: Family) -> tuple[int, int]:
    """Rank and world. Raises UserError where only one of them is set, or the rank is none of the world's."""
    rank, world = _number(env, [family.rank]), _number(env, [family.world])
    if rank is None or world is None:
        given, missing = (family.rank, family.world) if world is None else (family.world, family.rank)
        raise UserError(f"{given}={env[given]} is set in the environment and {missing} is not: set both or neither, or "
                        f"start with {family.launcher}")
    if rank >= world:
        raise UserError(f"{family.rank} {rank} must be below {family.world} {world}")
    return rank, world


def _checked(env: Mapping[str, str], family: Family, rank: int, world: int, local_rank: int, local_world: int) -> Place:
    """The place, when the local numbers agree with each other and with the whole."""
    if not local_rank < local_world <= world:
        told = {name: env[name] for name in (*family.local_rank, *family.local_world, family.rank, family.world)
                if env.get(name)}
        raise UserError(f"{', '.join(f'{k}={v}' for k, v in told.items())}: these contradict each other; start with "
                        f"{family.launcher}, or set them alike")
    return Place(rank, world, local_rank, local_world)


def _same(place: Place, started: Place) -> None:
    """Raises UserError where RANK and WORLD_SIZE, left in the environment, would make several processes one rank.

    A world larger than the launcher's is another launcher inside it, a machine's own."""
    if place.world < started.world or (place.world == started.world and place.rank != started.rank):
        raise UserError(f"RANK={place.rank} and WORLD_SIZE={place.world} are set in the environment, and the launcher "
                        f"says rank {started.rank} of {started.world} processes: unset RANK and WORLD_SIZE, or set "
                        "them for each process")


def _meeting_point(env: Mapping[str, str], place: Place, host: str) -> Place:
    """The place with the address where its ranks meet: MASTER_ADDR and MASTER_PORT win."""
    if place.world == 1:
        return place
    text = env.get("MASTER_PORT", "")
    if text and not (text.isdecimal() and 0 < int(text[:9]) < 1 << 16):
        raise UserError(f"MASTER_PORT={shown(text)!r} in the environment is not a port (1 to 65535)")
    port = FIRST_PORT + zlib.crc32(place.job.encode()) % PORTS if place.job else DEFAULT_PORT
    address = (env.get("MASTER_ADDR") or host).strip()
    if address.startswith("[") and address.endswith("]"):  # as in a URL
        address = address[1:-1]
    return replace(place, host=address, port=int(text) if text else port)


def _number(env: Mapping[str, str], names: Sequence[str]) -> int | None:
    """The first of the variables that is set; None where none is."""
    for name in names:
        text = env.get(name, "")
        if text:
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise UserError(f"{name}={shown(text)!r} in the environment is not a whole number; start with "
                                "torchrun, mpirun or srun")
            return int(text)
    return None
