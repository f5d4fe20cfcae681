"""A thread that ends this rank when a peer has died, and says which one was first.

A dead peer leaves the others in a collective: gloo notices for direct neighbours only, NCCL at its timeout. So each
rank writes its process id to the store, looks twice a second whether the processes of its own machine still live, and
reads a key that holds the first death anyone has seen. A stopped process lives, so each rank also counts up a
heartbeat: when a collective has run into its timeout, the ranks whose hearts stand still are named. Nothing is saved
then: the peers' states may be of different steps.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

POLL_SECONDS = 0.5
PATIENCE = 4
"""Polls in which a death must be seen, or a heart must beat, after a collective has failed."""
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
        self.beat = 0
        store.set(f"beat/{rank}", "0")
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

    def report(self, error: BaseException) -> None:
        """Writes this rank's own death to the store. A collective that failed is a consequence: then the cause is
        looked for, and this rank ends in its name; returns where none is found, or the error is this rank's own."""
        own = f"rank {self.rank} ({self.label}) failed: {type(error).__name__}: {error}"
        if not _is_collective(error):
            self.ended.set()
            self._first(own)
            return
        try:
            found = self._cause()
        except (RuntimeError, OSError):
            found = "the store of rank 0 is gone"
        self.ended.set()
        if found is not None:
            self._end(found)
        self._first(own)

    def run(self) -> None:
        """Looks twice a second until the run ends."""
        while not self.ended.wait(POLL_SECONDS):
            try:
                self.beat += 1
                self.store.set(f"beat/{self.rank}", str(self.beat))
                found = self._look()
            except (RuntimeError, OSError):
                found = "the store of rank 0 is gone"
            if found is not None and not self.ended.is_set():
                self._end(found)

    def _end(self, found: str) -> NoReturn:
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

    def _cause(self) -> str | None:
        """Why a collective failed: a death, or else ranks whose heart stood still while we looked."""
        before = self._beats()
        for _ in range(PATIENCE):
            found = self._look()
            if found is not None:
                return found
            time.sleep(POLL_SECONDS)
        still = [str(rank) for rank, (a, b) in enumerate(zip(before, self._beats(), strict=True)) if a == b]
        if not still:
            return None
        who = f"rank {still[0]} does" if len(still) == 1 else f"ranks {', '.join(still)} do"
        return self._first(f"{who} not respond (stopped, or its machine is gone): a collective has timed out")

    def _beats(self) -> list[bytes]:
        return [self.store.get(f"beat/{rank}") for rank in range(self.world)]

    def _first(self, message: str) -> str:
        """Writes a death down unless one stands there already; returns the one that stands there."""
        return self.store.compare_set(FAILED, "", message).decode() or message


def _is_collective(error: BaseException) -> bool:
    """Whether an error came out of a process group; gloo's are plain RuntimeErrors that name its source files."""
    if isinstance(error, dist.DistError):
        return True
    raised = traceback.extract_tb(error.__traceback__)
    where = raised[-1].filename if raised else ""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "distributed" in Path(where).parts)


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
