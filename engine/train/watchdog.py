"""A thread that ends this rank when a peer has died, and says which one was first.

A dead peer leaves the others in a collective: gloo notices for direct neighbours only, NCCL at its timeout. So each rank
writes its process id to the store, looks twice a second whether the processes of its own machine still live, and reads
a key that holds the first death anyone has seen. Nothing is saved then: the peers' states may be of different steps.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import torch.distributed as dist

POLL_SECONDS = 0.5
FAILED = "failed"


class Watchdog(threading.Thread):
    """Watches the ranks of one run until `stop`. It needs a store connection of its own: the main thread may block in
    a collective while it waits on another."""

    def __init__(self, store: dist.Store, rank: int, world: int, name: str) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.store = store
        self.rank, self.world = rank, world
        self.label = name
        self.ended = threading.Event()
        store.set(f"peer/{rank}", f"{socket.gethostname()} {os.getpid()} {_birth(os.getpid())}")
        self.neighbours: dict[int, tuple[int, str]] = {}

    def watch(self) -> None:
        """Learns the neighbours on this machine and starts; returns when every rank has written itself down."""
        for rank in range(self.world):
            host, pid, birth = self.store.get(f"peer/{rank}").decode().split(" ")
            if host == socket.gethostname() and rank != self.rank:
                self.neighbours[rank] = (int(pid), birth)
        self.start()

    def stop(self) -> None:
        """The run ends in order: a peer that is gone from now on has only been faster."""
        self.ended.set()

    def report(self, what: str) -> None:
        """Writes this rank's own death to the store, if none was written before."""
        self.ended.set()
        self._first(f"rank {self.rank} ({self.label}) {what}")

    def run(self) -> None:
        """Looks twice a second until the run ends."""
        while not self.ended.wait(POLL_SECONDS):
            try:
                found = self._look()
            except (RuntimeError, OSError):
                found = "the store of rank 0 is gone"
            if found is not None and not self.ended.is_set():
                print(f"{self.label}: {found}; this rank ends without saving", file=sys.stderr, flush=True)
                os._exit(1)

    def _look(self) -> str | None:
        """What has happened: the first death written down, or one seen now."""
        if self.store.check([FAILED]):
            return self.store.get(FAILED).decode()
        for rank, (pid, birth) in self.neighbours.items():
            if _birth(pid) != birth:
                return self._first(f"rank {rank} (process {pid}) has died")
        return None

    def _first(self, message: str) -> str:
        """Writes a death down unless one stands there already; returns the one that stands there."""
        return self.store.compare_set(FAILED, "", message).decode() or message


def _birth(pid: int) -> str:
    """When a process was started, in clock ticks since boot; '' when it is gone or a zombie (its number may return)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else _alive(pid)
    return "" if fields[0] in "ZX" else fields[19]


def _alive(pid: int) -> str:
    """The same question where there is no /proc: whether a signal could be sent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
