"""One hostile start: its exit code, what it printed, and what it left behind."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from engine import finetune, generate, pretrain, verify
from engine.errors import guarded

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
MOST_MEMORY = 1 << 30
LONGEST_LINE = 2100
Main = Callable[[list[str]], int]


def tool(name: str) -> Main:
    """A tool's or engine.generate's main, as its `__main__` runs it."""
    main = generate.main if name == "generate" else import_module(f"tools.{name}").main
    return lambda argv: guarded(lambda: main(argv))


PROGRAMS: dict[str, Main] = {"pretrain": pretrain.main, "finetune": finetune.main, "verify": verify.main,
                             **{name: tool(name) for name in ("generate", *TOOLS)}}


def files(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder under some folders, with size and time of change."""
    found = {}
    for folder in folders:
        for root, names, others in os.walk(folder):
            for name in (*names, *others):
                state = os.lstat(os.path.join(root, name))
                found[os.path.join(root, name)] = (state.st_size, state.st_mtime_ns) if name in others else (0, 0)
    return found


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return {int(pid) for pid in text.split()}


@contextmanager
def leaves_nothing(*folders: Path) -> Iterator[None]:
    """Fails where the block writes under `folders`, leaves processes or threads, or takes more than 1 GB."""
    before, running, threads = files(*folders), children(), threading.active_count()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert files(*folders) == before
    assert children() <= running and threading.active_count() <= threads
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_MEMORY


def refused(program: str, argv: Sequence[str], capsys: pytest.CaptureFixture[str], *folders: Path) -> str:
    """The one line that a program refuses `argv` with; it leaves nothing behind."""
    code, line = start(program, argv, capsys, *folders)
    assert code == 2, (code, line)
    return line


def start(program: str, argv: Sequence[str], capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, str]:
    """The exit code and stderr of a start that writes nothing; where it is 2, stderr is one printable line."""
    with leaves_nothing(*folders):
        code = PROGRAMS[program](list(argv))
    said = capsys.readouterr().err
    if code == 2:
        assert said.startswith("error: ") and said.endswith("\n") and said[:-1].isprintable(), said[:3000]
        assert len(said) <= LONGEST_LINE
        assert "x" * 201 not in said, "no more than 200 characters of foreign text"
    return code, said
