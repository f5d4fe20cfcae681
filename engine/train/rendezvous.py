"""Where ranks meet: the store, the word on how a run ends before all can know it by themselves, the process group.

A refusal, or a signal before the first step, ends all ranks in order: the first writes exit code and line to the store,
speaks, and waits until the others have read so; they end with the same code and are silent.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.errors import UserError, shown
from engine.train.place import Place

T = TypeVar("T")

NAME_SECONDS = 30.0
"""How long a host may be unknown: a cluster's names appear when its machines do."""
LINGER_SECONDS = 10.0
"""How long a rank that ends the run waits for the others to know, or for rank 0 to open the store."""
START_SECONDS = 20.0
"""How old a process is when ranks that were started with it have come to the store, or will hardly come any more."""
RUN, FAILED, AWARE = "triax/run", "failed", "aware"
"""Keys of the store: whose it is, `code rank line` of the first rank that has ended the run, and who knows of it."""


class NoMeeting(UserError):
    """The ranks cannot meet, so that none can tell the others why."""


class Reported(Exception):
    """A rank has crashed, for the reason that this is raised from, and the others have been told."""


class Ended(Exception):
    """The run ends in order on every rank: all have been told, and the first of them has said why."""

    def __init__(self, code: int, line: str) -> None:
        super().__init__(line)
        self.code = code


def refuse(place: Place, code: int, line: str, *, patience: float = LINGER_SECONDS, open_store: bool = True) -> None:
    """Ends the run in order before its ranks have met: the first says the line, and all return when all know of it.

    Where there is no store within `patience` seconds, each rank speaks: better said twice than never."""
    first, store = True, None
    if place.world > 1:
        with suppress(UserError, RuntimeError):
            store = connect(place, patience, open_store=open_store)
            first = end_run(store, place.rank, code, line)
    if first:
        print(line, file=sys.stderr, flush=True)
    if store is not None:
        linger(store, place.world)


def end_run(store: dist.Store, rank: int, code: int, line: str) -> bool:
    """Writes down how the run ends, unless that stands there already; returns whether this rank is the first."""
    own = f"{code} {rank} {line}"
    first = store.compare_set(FAILED, "", own).decode() == own
    be_aware(store, rank)
    return first


def be_aware(store: dist.Store, rank: int) -> None:
    """Writes down that a rank knows how the run ends."""
    store.append(AWARE, f"{rank};")  # type: ignore[attr-defined]  # torch's stub of `Store` lacks it


def linger(store: dist.Store, world: int, seconds: float = LINGER_SECONDS,
           gone: Callable[[], set[int]] = lambda: set()) -> None:
    """Returns when all ranks know how the run ends, or are `gone`: a launcher kills the others as soon as one has left,
    and the store leaves with rank 0. Those that have come are waited for so many seconds; one that has not come is
    waited for while this process is young, since it may still be starting.

    In a thread: a store that freezes now would hold this rank for good."""
    began = time.monotonic()
    most_for_late = min(START_SECONDS, START_SECONDS - _age())

    def wait() -> None:
        with suppress(RuntimeError):
            while True:
                aware = {int(rank) for rank in store.get(AWARE).decode().split(";")[:-1]}
                missing = set(range(world)) - aware - gone()
                late = {rank for rank in missing if not store.check([f"seat/{rank}"])}
                passed = time.monotonic() - began
                if not (missing - late and passed < seconds) and not (late and passed < most_for_late):
                    return
                time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True, name="linger")
    thread.start()
    thread.join(max(seconds, most_for_late) + 1)


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    with suppress(OSError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def connect(place: Place, timeout: float, *, open_store: bool = True) -> dist.Store:
    """The store where ranks meet: torchrun's own, or one that rank 0 opens. `open_store` is for a rank's first
    connection, which opens the store and takes the rank's seat. Raises NoMeeting, within `timeout` seconds, for an
    unknown host, a taken port, a store that is not there or another run's, and a seat that is taken."""
    serves = open_store and place.rank == 0 and not place.agent
    _resolve(place, min(timeout, NAME_SECONDS))
    limit = timedelta(seconds=timeout)
    if serves:
        store = _serve(place, limit)
        store.set(RUN, _own(place))
        _reach(place, min(timeout, LINGER_SECONDS), "is MASTER_ADDR the address of this machine, where rank 0 runs?")
    else:
        if not place.agent:
            _reach(place, timeout, "was rank 0 started, and is MASTER_ADDR its machine?")
        store = _within(timeout, place, lambda: dist.TCPStore(place.host, place.port, is_master=False,
                                                              wait_for_workers=False, timeout=limit))
    if not place.agent:
        _refuse_foreign(store, place, timeout)
    mine = dist.PrefixStore(f"triax/{place.job}/{place.world}", store)
    if open_store and _within(timeout, place, lambda: mine.add(f"seat/{place.rank}", 1)) > 1:
        raise NoMeeting(f"another rank {place.rank} meets at {place.host} port {place.port}: is another run using it? "
                        "Set another MASTER_PORT")
    return mine


def _own(place: Place) -> str:
    """What tells runs apart that meet at one port."""
    return f"{place.world} {place.job}"


def _refuse_foreign(store: dist.Store, place: Place, timeout: float) -> None:
    """Raises NoMeeting where the store is another run's: its ranks would never come to this one's meeting."""
    limit = min(timeout / 2, LINGER_SECONDS)

    def ask() -> str:
        store.wait([RUN], timedelta(seconds=limit))  # a store without it is no run's of ours
        return store.get(RUN).decode()

    found = _within(timeout, place, ask)
    if found != _own(place):
        world, _, job = found.partition(" ")
        whose = (f"of {shown(world)} ranks, and this one has {place.world}" if world != str(place.world) else
                 f"of job {shown(job)!r}, and this one is {place.job!r}")
        raise NoMeeting(f"what answers at {shown(place.host)} port {place.port} is rank 0 of another run, {whose}; set "
                        "another MASTER_PORT")


def _within(limit: float, place: Place, talk: Callable[[], T]) -> T:
    """What the store answers, within a limit. In a thread: torch's own timeout does not cover a listener that takes the
    connection and says nothing, such as another program, or a rank 0 that is stopped."""
    answers: list[T] = []
    errors: list[RuntimeError] = []

    def ask() -> None:
        try:
            answers.append(talk())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="meet")
    thread.start()
    thread.join(limit)
    if answers:
        return answers[0]
    where = f"what answers at {shown(place.host)} port {place.port}"
    if errors:
        raise NoMeeting(f"{where} is no store of a run; is MASTER_PORT right?") from errors[0]
    who = "torchrun's agent" if place.agent else "rank 0"
    raise NoMeeting(f"{where} says nothing for {limit:g} s; is {who} stopped, or does another program listen there?")


def _serve(place: Place, limit: timedelta) -> dist.TCPStore:
    try:  # listens on every address; by 127.0.0.1 its own client needs no name
        return dist.TCPStore("127.0.0.1", place.port, is_master=True, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        raise NoMeeting(f"MASTER_PORT {place.port} on {place.host} cannot be opened; is another run using it? Set "
                        "another MASTER_PORT") from error


def _resolve(place: Place, limit: float) -> None:
    """Waits until the host has an address. In a thread: a name server that is gone holds a look-up for minutes."""
    host = shown(place.host)
    deadline = time.monotonic() + limit
    told: list[str] = []  # what the look-ups came to, '' for found

    def look() -> None:
        while time.monotonic() < deadline:
            try:
                socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                told.append(getattr(error, "strerror", None) or str(error))
                time.sleep(0.5)
            else:
                told.append("")
                return

    thread = threading.Thread(target=look, daemon=True, name="resolve")
    thread.start()
    thread.join(limit)
    if not told or told[-1]:
        why = told[-1] if told else "no answer from the name server"
        raise NoMeeting(f"MASTER_ADDR {host!r} is not a host that this machine knows ({why}, for {limit:g} s); "
                        "give the name or address of the machine of rank 0")


def _reach(place: Place, limit: float, hint: str) -> None:
    """Waits until something listens where the store is. In Python: TCPStore's own tries print C++ frames, and no
    signal is seen meanwhile."""
    deadline = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise NoMeeting(f"nothing answers at {shown(place.host)} port {place.port} within {limit:g} s; "
                                f"{hint}") from None
        time.sleep(0.1)


def start_group(place: Place, device: torch.device, timeout: float, store: dist.Store | None) -> None:
    """The process group over all ranks that meet at `store` (None where a process is alone): NCCL on GPUs, gloo on
    CPUs, with a timeout that is set."""
    if store is None:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "GLOO_SOCKET_IFNAME" not in os.environ and _loopback(place):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # one machine: nothing listens on the network
    # With device_id NCCL connects every group when it is made: connecting at the first message would make a receive
    # that is posted early block until its peer sends, and two stages could wait for each other.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=place.rank,
                            world_size=place.world, timeout=timedelta(seconds=timeout),
                            device_id=device if device.type == "cuda" else None)


def _loopback(place: Place) -> bool:
    """Whether all ranks meet on this machine."""
    local = {"localhost", "127.0.0.1", "::1", socket.gethostname()}
    return place.one_machine and place.host in local and any(name == "lo" for _, name in socket.if_nameindex())
