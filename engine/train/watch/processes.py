"""The processes of this machine: is one of them still the one it was, and which of them has ended first."""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process by its number and its birth: numbers return."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The one that has this number now."""
        return cls(pid, birth(pid))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return birth(self.pid) == self.birth


class Processes:
    """The processes of other ranks on this machine. A pidfd wakes the watcher when one ends, so that the first to end
    is known, and not one that ended because of it; where there are none, each `wait` looks once. `gone` are the ranks
    whose processes have ended, in this order."""

    def __init__(self) -> None:
        self.known: dict[int, Process] = {}
        self.gone: list[int] = []
        self.poll = select.poll()
        self.ranks: dict[int, int] = {}  # by file descriptor

    def add(self, rank: int, process: Process) -> None:
        """Begins to watch a rank's process."""
        self.known[rank] = process
        try:
            number = os.pidfd_open(process.pid)
        except (AttributeError, OSError):  # no such call here, or it has ended already
            return
        self.ranks[number] = rank
        self.poll.register(number, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Returns after some seconds, or at once when a process ends."""
        if self.ranks:
            for number, _ in self.poll.poll(seconds * 1000):
                self.poll.unregister(number)
                os.close(number)
                self.gone.append(self.ranks.pop(number))
        else:
            time.sleep(seconds)
        self.gone += [rank for rank, process in self.known.items() if rank not in self.gone and not process.alive]


def machine() -> str:
    """The same word for processes that see each other's numbers: host, boot and the namespace of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    facts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else "",
             str(os.stat(space).st_ino) if space.exists() else ""]
    return ",".join(facts).replace(" ", "_")


def birth(pid: int) -> str:
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
