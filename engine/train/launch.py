"""From processes to ranks: who am I, the store we meet at, the process group, and how each kind of end looks.

Bad input is known before a process group exists: rank 0 says it in one line and every rank exits with 2. A crash in one
rank is written to the store with its name; the watchdog of every other rank reads it there and ends its process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from engine.errors import UserError

BAD_INPUT, CRASHED = 2, 1
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's names for what `mallopt` sets (malloc.h)."""


class Diverged(RuntimeError):
    """The loss or the gradient norm is not finite; no weight has moved."""


@dataclass(frozen=True)
class Place:
    """This process among the others, from the environment that torchrun (or mpirun, srun with RANK set) gives."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def place_from_environment() -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; one process alone where they are not set."""
    numbers = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"{name}={text!r} in the environment is not a whole number; start with torchrun")
        numbers[name] = int(text)
    place = Place(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"])
    if place.rank >= place.world:
        raise UserError(f"RANK {place.rank} must be below WORLD_SIZE {place.world}")
    return place


def run_rank(body: Callable[[], int]) -> int:
    """Runs one rank's work and turns each kind of end into an exit code and a message."""
    try:
        return int(record(body)() or 0)
    except UserError as error:
        return _say_once(f"error: {error}", BAD_INPUT)
    except Diverged as error:
        return _say_once(f"error: {error}", CRASHED)
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(CRASHED)  # a peer may hang in a collective with us: no orderly shutdown is to be had


def _say_once(line: str, code: int) -> int:
    """Rank 0 says what all ranks found; another rank speaks only if rank 0's exit has not ended it within a second."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends us as soon as rank 0 is gone
        time.sleep(1.0)
    print(line, file=sys.stderr, flush=True)
    if dist.is_initialized():  # taking the group apart while a peer is in a collective with us aborts the process
        sys.stdout.flush()
        os._exit(code)
    return code


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` is this rank's GPU where there is one. Raises UserError when CUDA is asked for and not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no GPU; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; "
                        "start fewer processes per node")
    return torch.device("cuda", local_rank)


def set_threads(local_world: int) -> None:
    """The cores of the machine, shared by its ranks; torchrun sets OMP_NUM_THREADS=1, which wastes the others. Alone,
    a process does what the user has set."""
    if local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def tune_allocator() -> None:
    """Keeps freed memory instead of returning it to the system, and asks for huge pages: on CPUs a step allocates and
    frees activations of many megabytes, and each new page costs a fault (6 to 9 % of a step, benchmarks/LOG.md).

    glibc only, elsewhere nothing happens; before the first tensor, since torch reads its variable once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_MMAP_THRESHOLD, 1 << 25), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 1 << 26)):
        mallopt(option, value)


def connect(place: Place, timeout: float, *, open_store: bool = True) -> dist.Store:
    """The store where ranks meet: torchrun's own, or one that rank 0 opens (once: `open_store`). Raises UserError for a
    taken port."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    text = os.environ.get("MASTER_PORT", "29500")
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise UserError(f"MASTER_PORT={text!r} in the environment is not a port (1 to 65535)")
    port = int(text)
    serves = open_store and place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:  # DistNetworkError and friends
        if serves:
            raise UserError(f"MASTER_PORT {port} on {host} cannot be opened; is another run using it? Set another "
                            "MASTER_PORT") from error
        raise
    return dist.PrefixStore(f"triax/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def start_group(place: Place, device: torch.device, timeout: float, store: dist.Store | None) -> None:
    """The process group over all ranks that meet at `store` (None where a process is alone): NCCL on GPUs, gloo on
    CPUs, with a timeout that is set."""
    if store is None:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "GLOO_SOCKET_IFNAME" not in os.environ and _loopback():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # one machine: nothing listens on the network
    # With device_id NCCL connects every group when it is made: connecting at the first message would make a receive
    # that is posted early block until its peer sends, and two stages could wait for each other.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=place.rank,
                            world_size=place.world, timeout=timedelta(seconds=timeout),
                            device_id=device if device.type == "cuda" else None)


def _loopback() -> bool:
    """Whether all ranks meet on this machine."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    local = {"localhost", "127.0.0.1", "::1", socket.gethostname()}
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return alone and host in local and any(name == "lo" for _, name in socket.if_nameindex())
