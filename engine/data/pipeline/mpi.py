"""Many machines: `mpirun -n N python tools/preprocess_data.py ...`. Every rank makes its share of the shards in the
work folder, which all must see; rank 0 plans before and merges after. Between ranks go two arrays of numbers and
barriers, never Python objects: those would be pickles. A rank that fails says so with its name and ends the job.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.indexed import with_suffix
from engine.data.pipeline.job import Job
from engine.data.pipeline.shard import ShardMaker, Told
from engine.data.pipeline.work import Shards, Work
from engine.errors import UserError

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Set for each process by Open MPI's and by MPICH's launcher (and by their kin)."""
_PMIX = "PMIX_RANK"
"""Set where a batch system's launcher (srun) starts the processes itself."""
_POLL_S = 0.02
_SEEN_WITHIN_S = 60.0  # a network file system may show a new file late


def world() -> Any | None:
    """mpi4py's communicator of all ranks; None where no MPI launcher started more than one.

    Raises UserError where one did and mpi4py is missing."""
    sizes = [int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdigit()]
    if not sizes and _PMIX not in os.environ:
        return None
    if sizes and max(sizes) == 1:
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"an MPI launcher started {max(sizes, default='several')} processes, and they need mpi4py to know of each "
            f"other: pip install mpi4py ({error})"
        ) from None
    return MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() > 1 else None


@contextlib.contextmanager
def aborting(comm: Any) -> Iterator[None]:
    """Ends all ranks when this one fails, saying which it was."""
    try:
        yield
    except BaseException as error:
        text = f"error: {error}" if isinstance(error, UserError) else traceback.format_exc()
        print(f"rank {comm.Get_rank()} of {comm.Get_size()} on {platform.node()}: {text}", file=sys.stderr, flush=True)
        comm.Abort(2)


def lead(comm: Any, work: Work, missing: Sequence[int], maker: ShardMaker, told: Told) -> None:
    """Rank 0: gives every rank its share of the units, makes its own, waits for all."""
    head = np.array([len(missing), int(work.token, 16)], np.uint64)
    _wait(comm.Ibcast(head, root=0))
    _wait(comm.Ibcast(np.array(missing, np.int64), root=0))
    for unit in missing[:: comm.Get_size()]:
        maker.make(unit, told)
    _wait(comm.Ibarrier())
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while unseen := [unit for unit in missing if not work.finished(unit)]:
        if time.monotonic() > deadline:
            raise UserError(f"{len(unseen)} shards that other ranks made are not in {work.folder} as rank 0 sees it; "
                            "the output's folder must be one that all machines share")
        time.sleep(_POLL_S * 10)


def follow(comm: Any, output_prefix: str) -> None:
    """Any other rank: makes its share of the units, and waits until rank 0 has merged them."""
    head = np.empty(2, np.uint64)
    _wait(comm.Ibcast(head, root=0))
    missing = np.empty(int(head[0]), np.int64)
    _wait(comm.Ibcast(missing, root=0))
    mine = missing[comm.Get_rank() :: comm.Get_size()].tolist()
    if mine:
        folder = with_suffix(output_prefix, ".work")
        maker = ShardMaker(Job.load(_seen(folder / "job.json")), Shards(folder, f"{int(head[1]):016x}"))
        for unit in mine:
            maker.make(unit, lambda read, documents: None)
    _wait(comm.Ibarrier())
    finish(comm)


def finish(comm: Any) -> None:
    """Every rank, when the output is in place: none leaves before it is."""
    _wait(comm.Ibarrier())


def _seen(path: Path) -> Path:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_S * 10)
    if not path.exists():
        raise UserError(f"{path}, written by rank 0, is not here; the output's folder must be one all machines share")
    return path


def _wait(request: Any) -> None:
    """Until it is done, asleep: MPI's own waiting takes a whole core."""
    while not request.Test():
        time.sleep(_POLL_S)
