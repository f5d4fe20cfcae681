"""Processes of Python that start at once: forks of one that has imported torch and the engine.

tests/conftest.py names what is imported. The fork is a process of its own in all that the tests look at: its
environment, signals, files, exit code and death.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_context = multiprocessing.get_context("forkserver")


class Forked:
    """A started process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, program: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> None:
        """Starts `python PROGRAM...`; what it prints goes to the ends of two files (or of one)."""
        words = [str(word) for word in program]
        self._process = _context.Process(target=_become, args=(words, dict(env), str(cwd), str(out), str(err)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code (minus the signal's number for a death), None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _become(program: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> NoReturn:
    """Turns this fork into `python PROGRAM...`."""
    for number, path in ((1, out), (2, err)):
        sink = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(sink, number)
        os.close(sink)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if env.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
        raise SystemExit(0)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  an exception is being handled
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()
