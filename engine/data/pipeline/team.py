"""Worker processes of one machine. They are given numbers of units and report how far they are; no text and no token
crosses a pipe.

Each worker hangs on a pipe of its own, so that a death on either side is an end of file on the other at once; the
standard library's pools can wait for ever for a worker that was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from engine.data.pipeline.job import Job
from engine.data.pipeline.shard import ShardMaker, Told
from engine.data.pipeline.work import Shards
from engine.errors import UserError


def run_team(
    job: Job, shards: Shards, units: Iterable[int], workers: int, told: Told,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Makes the shards of units by that many processes. They are put in place from here, so that nobody else waits for
    the disk. meanwhile: done here as they start.

    Raises UserError for a bad record and for a worker that dies."""
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, shards.folder, shards.token), daemon=True)
            process.start()
            theirs.close()  # the worker holds the only copy now
            team[ours] = process
        meanwhile()
        _lead(list(team), iter(units), told, partial(shards.publish, parts=job.parts))
    except _Died:
        raise UserError(
            f"one of the {workers} worker processes died (killed, or out of memory); try again with fewer --workers"
        ) from None
    finally:
        for pipe, process in team.items():
            pipe.close()
            process.terminate()
            process.join()


class _Died(Exception):
    """A worker is no more."""


def _lead(idle: list[Connection], units: Iterator[int], told: Told, publish: Callable[..., None]) -> None:
    """Keeps every worker at work until all units are done; what they have written is put in place while they go on.
    publish: is told the unit and pid=the process that wrote it. Raises _Died, and what publish raises."""
    busy: set[Connection] = set()
    written: list[tuple[int, int]] = []
    more = True
    while more or busy or written:
        while more and idle:
            unit = next(units, None)
            if unit is None:
                more = False
                break
            with _alive():
                idle[-1].send(unit)
            busy.add(idle.pop())
        if written:
            unit, pid = written.pop()
            publish(unit, pid=pid)
        ready: Any = wait(list(busy), timeout=0 if written else None) if busy else ()
        for pipe in ready:
            with _alive():
                kind, *rest = pipe.recv()
            if kind == "written":
                written.append((rest[0], rest[1]))
                busy.remove(pipe)
                idle.append(pipe)
            elif kind == "error":
                for unit, pid in written:
                    publish(unit, pid=pid)
                raise UserError(rest[0])
            elif kind == "crash":
                raise RuntimeError(f"a worker process failed:\n{rest[0]}")
            else:
                told(*rest)


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Raises _Died where a pipe has no other end."""
    try:
        yield
    except (EOFError, OSError):
        raise _Died from None


def _serve(pipe: Connection, folder: Path, token: str) -> None:
    """A worker: makes shards until the pipe ends, as it also does when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process' to handle

    def report(*numbers: int) -> None:
        pipe.send(("at", *numbers))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        answer: tuple[Any, ...]
        try:
            maker = ShardMaker(Job.load(folder / "job.json"), Shards(folder, token))
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
