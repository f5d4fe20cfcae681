"""Worker processes of one machine. They are given numbers of units and report how far they are; no text and no token
crosses a pipe.

Each worker hangs on a pipe of its own, so that a death on either side is an end of file on the other at once; the
standard library's pools can wait for ever for a worker that was killed.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from engine.data.pipeline.job import Job
from engine.data.pipeline.shard import ShardMaker, Told
from engine.data.pipeline.work import Shards, Work
from engine.errors import UserError


def run_team(
    maker: ShardMaker, work: Work, units: Iterable[int], workers: int, told: Told, meanwhile: Callable[[], None]
) -> None:
    """Makes the shards of units by that many processes. They are put in place from here, so that nobody else waits for
    the disk. meanwhile: done here as they make the first ones.

    Raises UserError for a bad record and for a worker that dies."""
    fork = _is_single_threaded()
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    team: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            if fork:
                given: tuple[Any, ...] = (lambda: maker, *team, ours, work.lock)
            else:
                given = (partial(_load, work.folder, work.token),)
            process = context.Process(target=_serve, args=(theirs, *given), daemon=True)
            process.start()
            theirs.close()  # the worker holds the only copy now
            team[ours] = process
        _lead(list(team), iter(units), told, partial(work.publish, parts=maker.job.parts), meanwhile)
    except _Died:
        raise UserError(
            f"one of the {workers} worker processes died (killed, or out of memory); try again with fewer --workers"
        ) from None
    finally:
        for pipe, process in team.items():
            pipe.close()
            process.terminate()
            process.join()


def _is_single_threaded() -> bool:
    """Whether this process surely has one thread. Then it may be forked, which saves its workers a third of a second
    each: no other thread can hold a lock that they would wait for."""
    return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


class _Died(Exception):
    """A worker is no more."""


def _lead(
    idle: list[Connection], units: Iterator[int], told: Told, publish: Callable[..., None],
    meanwhile: Callable[[], None],
) -> None:
    """Keeps every worker at work until all units are done; what they have written is put in place while they go on, by
    a thread, so that none of them waits for the disk; also what is written when this ends by an error.
    publish: is told the unit and pid=the process that wrote it. Raises _Died, and what publish raises."""
    busy: set[Connection] = set()
    placed: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as placer:
        _hand_out(units, idle, busy)
        meanwhile()
        while busy:
            ready: Any = wait(list(busy))
            for pipe in ready:
                with _alive():
                    kind, *rest = pipe.recv()
                if kind == "written":
                    placed.append(placer.submit(publish, rest[0], pid=rest[1]))
                    busy.remove(pipe)
                    idle.append(pipe)
                elif kind == "error":
                    raise UserError(rest[0])
                elif kind == "crash":
                    raise RuntimeError(f"a worker process failed:\n{rest[0]}")
                else:
                    told(*rest)
            _hand_out(units, idle, busy)
            while placed and placed[0].done():
                placed.popleft().result()
        for one in placed:
            one.result()


def _hand_out(units: Iterator[int], idle: list[Connection], busy: set[Connection]) -> None:
    """Gives each idle worker a unit, while there are any."""
    for unit in itertools.islice(units, len(idle)):
        with _alive():
            idle[-1].send(unit)
        busy.add(idle.pop())


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Raises _Died where a pipe has no other end."""
    try:
        yield
    except (EOFError, OSError):
        raise _Died from None


def _load(folder: Path, token: str) -> ShardMaker:
    return ShardMaker(Job.load(folder / "job.json"), Shards(folder, token))


def _serve(pipe: Connection, maker_of: Callable[[], ShardMaker], *inherited: Connection | IO[bytes]) -> None:
    """A worker: makes shards until the pipe ends, as it also does when the main process is killed. inherited: what is
    the main process' alone, and would stay open here after its end."""
    for one in inherited:
        one.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process' to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def report(*numbers: int) -> None:
        pipe.send(("at", *numbers))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        answer: tuple[Any, ...]
        try:
            maker = maker_of()
            while True:
                unit = pipe.recv()
                maker.write(unit, report)
                pipe.send(("written", unit, os.getpid()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except UserError as error:
            answer = ("error", str(error))
        except MemoryError:
            answer = ("error", "a worker process has no more memory; try again with fewer --workers")
        except Exception:
            answer = ("crash", traceback.format_exc())
        pipe.send(answer)
