"""The watch over one rank: it begins before the process group and ends this process when the run has failed anywhere.

A dead peer leaves the others in a collective: gloo notices for direct neighbours only, NCCL at its timeout, and a rank
that hangs is noticed by neither. So each rank has a thread that publishes its heart in the store twice a second, waits
for the end of the processes on its own machine, and reads a key that holds the first fault anyone has seen. A rank
whose main thread stands still reports itself; a rank that waits for too long looks at all hearts, by one call, and
names the one that does not answer. Nothing is saved then: the peers' states may be of different steps.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from engine.comm.heart import Heart, Phase
from engine.errors import shown
from engine.train.launch import tell_launcher
from engine.train.rendezvous import AWARE, FAILED, be_aware, linger
from engine.train.watch.guard import Guard
from engine.train.watch.processes import Process, Processes, machine
from engine.train.watch.pulse import NOBODY, Finding, Limits, Pulse, Stillness, Table, hanging, verdict

POLL = 0.5
"""Seconds between two looks."""
LINGER = 3.0
"""Seconds for which the rank that serves the store keeps it, so that the others learn why the run ends."""


class Watch(threading.Thread):
    """Watches over this rank from `start` to `stop`. `store` is a connection of its own: the main thread may block in
    the group's. `served` says whose store it is ("rank 0", "torchrun's agent"), `serves` whether it is this process's.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limits: Limits, *, served: str,
                 serves: bool) -> None:
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.world, self.limits = store, rank, world, limits
        self.served, self.serves = served, serves
        self.heart = Heart()
        self.label = f"rank {rank} of {world}"
        self.ended = threading.Event()
        self.urgent = False  # a collective has failed: the hearts are looked at without waiting for a limit
        self.looks = 0
        self.stopped = 0.0  # the longest time between two looks: how long this process has been stopped
        self.one_end = threading.Lock()  # two threads may find the end at the same moment; one of them says it
        self.host, self.machine = socket.gethostname(), machine()
        self.processes = Processes()
        self.still = Stillness(10 * POLL)
        self.look: tuple[float, Table] | None = None
        self.guard = Guard(lambda: self.looks, self._silent, limits.peers + 2 * POLL,
                           lambda: limits.of(self.heart.phase))
        self.heart.turned = self.guard.arm

    def start(self) -> None:
        """Writes this rank down and begins to watch. Raises what a store raises that has gone."""
        self.guard.start()  # first: a store that freezes answers none of the calls below
        try:
            self._write_down()
        except BaseException:
            self.guard.stop()
            raise
        super().start()

    def _write_down(self) -> None:
        store, own = self.store, Process.of(os.getpid())
        store.set_timeout(timedelta(seconds=self.limits.last))  # the guard ends a silence before torch complains of it
        for rank in range(self.world) if self.rank == 0 else ():  # who has not come yet has an empty pulse
            # Appended: it makes the key and erases no pulse. torch's stub of `Store` lacks two of its methods.
            store.append(f"pulse/{rank}", "")  # type: ignore[attr-defined]
        store.set(f"pulse/{self.rank}", self._pulse().text())  # at once: a rank that hangs now has come
        store.compare_set(FAILED, "", "")  # a key that is read must be there
        store.append(AWARE, "")  # type: ignore[attr-defined]
        store.append(f"machine/{self.machine}", f"{self.rank} {own.pid} {own.birth};")  # type: ignore[attr-defined]

    def stop(self) -> None:
        """The run ends in order: from now on this rank may go."""
        self.ended.set()
        self.guard.stop()
        self.join(2 * POLL)

    def report(self, error: BaseException) -> None:
        """Tells the others why this rank ends, and returns. A collective that failed is a consequence: its cause is
        looked for first, and where there is one, this process ends in its name."""
        if _is_collective(error):
            self.urgent = True
            time.sleep(2 * self._patience() + 4 * POLL)  # the thread ends the process when it finds the cause
        own = f"{type(error).__name__}: {shown(str(error).partition(chr(10))[0], 1000)}"
        found = Finding(self.rank, f"rank {self.rank} ({self.label}) failed: {own}")
        self.one_end.acquire()
        self.ended.set()
        self.guard.stop()
        with suppress(RuntimeError, OSError):
            self._tell(found)
            self._linger()

    def run(self) -> None:
        """Looks until the run ends."""
        last = time.monotonic()
        while not self.ended.is_set():
            self.processes.wait(POLL)
            now = time.monotonic()
            self.stopped = max(self.stopped, now - last)
            last = now
            pulse = self._pulse()
            try:
                found = self._poll(pulse)
            except (RuntimeError, OSError):
                found = self._without_store(pulse)
            self.looks += 1
            if found is not None and not self.ended.is_set():
                self._end(found)

    def _pulse(self) -> Pulse:
        """This rank's heart as it is now."""
        waiting = self.heart.waiting  # read first: a main thread that waits no more has beaten before it said so
        beats = self.heart.beats
        still = self.still.look(beats, time.monotonic())
        return Pulse(self.looks, beats, still, waiting, self.heart.step, self.heart.phase, os.getpid(), self.host)

    def _poll(self, pulse: Pulse) -> Finding | None:
        """One look at everything; what has ended the run, if anything has."""
        self.store.set(f"pulse/{self.rank}", pulse.text())
        failed, neighbours = self.store.multi_get([FAILED, f"machine/{self.machine}"])
        found = Finding.parse(failed.decode())
        if found is not None:
            return found
        self._meet(neighbours.decode())
        if self.processes.gone and pulse.phase is not Phase.END:  # at the end it has only been faster
            return self._tell(self._death())
        limit = self.limits.of(pulse.phase)
        if pulse.still > limit and not pulse.waiting and not self.urgent:
            return self._tell(hanging(self.rank, pulse))
        if self.urgent or (pulse.waiting and pulse.still > limit - self._patience()):
            return self._judge(limit)
        self.look = None
        return None

    def _without_store(self, pulse: Pulse) -> Finding | None:
        """What it means that the store is gone."""
        if pulse.phase is not Phase.END:
            if self.processes.gone:
                return self._death()
            return Finding(NOBODY, f"{self.served} is gone, and its store with it")
        if pulse.still > self.limits.peers:
            return Finding(NOBODY, f"{self.served} is gone, and not all ranks have come to the end of the run")
        return None

    def _meet(self, listed: str) -> None:
        """Watches the processes of this machine that have written themselves down."""
        for item in listed.split(";")[:-1]:
            rank, pid, birth = item.split(" ")
            if int(rank) != self.rank and int(rank) not in self.processes.known:
                self.processes.add(int(rank), Process(int(pid), birth))

    def _death(self) -> Finding:
        """The first process that has ended."""
        first = self.processes.gone[0]
        if self.stopped > self.limits.peers:
            return Finding(first, f"rank {self.rank} was stopped for {self.stopped:.0f} s, and the others have ended "
                           "meanwhile")
        return Finding(first, f"rank {first} (process {self.processes.known[first].pid}) has died")

    def _patience(self) -> float:
        """Seconds between two looks at all hearts: a watch that has not published for so long is stopped."""
        return min(3.0 if self.urgent else 15.0, max(2.0, self.limits.peers / 4))

    def _judge(self, seconds: float) -> Finding | None:
        """Looks at all hearts by one call, and again when patience is over."""
        now = time.monotonic()
        if self.look is not None and now - self.look[0] < self._patience():
            return None
        before = self.look[1] if self.look is not None else None
        after = self._all_pulses()
        self.look = now, after
        found = verdict(before, after, seconds) if before is not None else None
        return None if found is None else self._tell(found)

    def _all_pulses(self) -> Table:
        keys = [f"pulse/{rank}" for rank in range(self.world)]
        if not self.store.check(keys[:1]):  # rank 0 has not come, which makes these keys: reading one would block
            return [None]
        return [Pulse.parse(value.decode()) for value in self.store.multi_get(keys)]

    def _tell(self, found: Finding) -> Finding:
        """Writes down why the run ends, unless that stands there already; returns what stands there."""
        return Finding.parse(self.store.compare_set(FAILED, "", found.line()).decode()) or found

    def _silent(self, seconds: float) -> None:
        """The guard's finding."""
        self._end(Finding(NOBODY, f"{self.served} does not respond (stopped, or its machine is gone): its store has "
                          f"been silent for {seconds:.0f} s"), linger=False)

    def _end(self, found: Finding, *, linger: bool = True) -> NoReturn:
        """Says why, and ends the process. What the main thread holds (a collective, a lock) does not matter."""
        self.one_end.acquire()
        tell_launcher(found.text)
        if found.in_order:
            with suppress(RuntimeError, OSError):
                be_aware(self.store, self.rank)
            os._exit(found.code)  # the rank that ended the run has said why
        if found.rank == self.rank:
            with suppress(RuntimeError, ValueError, OSError, AttributeError):
                faulthandler.dump_traceback(file=sys.stderr)
        print(f"{self.label}: {found.text}; this rank ends without saving", file=sys.stderr, flush=True)
        if linger:
            with suppress(RuntimeError, OSError):
                self._linger()
        os._exit(found.code)

    def _linger(self) -> None:
        """Writes this rank down among those that know; the one that serves the store waits for the others."""
        be_aware(self.store, self.rank)
        if self.serves:
            linger(self.store, self.world, LINGER, self._gone)

    def _gone(self) -> set[int]:
        """The ranks of this machine whose processes have ended."""
        return {rank for rank, process in list(self.processes.known.items()) if not process.alive}


def _is_collective(error: BaseException) -> bool:
    """Whether an error came out of a process group; gloo's are plain RuntimeErrors that name its source files."""
    if isinstance(error, dist.DistError):
        return True
    raised = traceback.extract_tb(error.__traceback__)
    where = raised[-1].filename if raised else ""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "distributed" in Path(where).parts)
