"""What benchmarks share: processes that wait for their turn, facts about the machine, tables, and committed results."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

Stepper = Callable[[], None]
"""One training step."""


@dataclass
class Contender:
    """One side of a comparison: `build(rank, world, **options)` gives its step; its processes live on."""

    name: str
    build: Callable[..., Stepper]
    world: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    """Environment of its processes beyond ours, for what is read when a library loads."""
    seconds: list[float] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def start(self) -> None:
        """Starts its ranks; they build their models and then wait."""
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(self.world):
            here, there = context.Pipe()
            before = dict(os.environ)
            os.environ.update(self.env)
            context.Process(target=_serve, args=(there, self, rank, port), daemon=True).start()
            for name in self.env:
                del os.environ[name]
            os.environ.update(before)
            self.pipes.append(here)
        for pipe in self.pipes:
            pipe.recv()

    def turn(self, steps: int) -> None:
        """Runs some steps and keeps the seconds of one."""
        for pipe in self.pipes:
            pipe.send(steps)
        self.seconds.append(max(pipe.recv() for pipe in self.pipes))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pipes": []}


def _serve(pipe: Connection, contender: Contender, rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(contender.world))
    import torch

    threads = contender.env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)) // contender.world
    torch.set_num_threads(max(1, int(threads)))
    step = contender.build(rank, contender.world, **contender.options)
    step()  # warm-up: allocations, lazy initialisation
    pipe.send("ready")
    while True:
        try:
            steps = pipe.recv()
        except EOFError:  # the race is over
            os._exit(0)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send((time.perf_counter() - start) / steps)


def race(contenders: Sequence[Contender], rounds: int, steps: int, say: Callable[[str], None] = print) -> None:
    """Lets every contender take a turn, `rounds` times; the machine's moods then fall on all alike."""
    for contender in contenders:
        contender.start()
        say(f"  ready: {contender.name}")
    for number in range(rounds):
        for contender in contenders:
            contender.turn(steps)
        say(f"  round {number + 1}/{rounds}: " + ", ".join(f"{c.name} {c.seconds[-1]:.3f} s" for c in contenders))


@dataclass
class Quiet:
    """Waits until other processes leave the machine alone, and repeats a turn in which they took more than `limit` of
    it; for `patience` seconds in all.

    `shares` holds what they took in the turns that count: a figure with neighbours is told as one.
    """

    patience: float = 0.0
    limit: float = 0.1
    shares: list[float] = field(default_factory=list)

    def turn(self, action: Callable[[], Result]) -> Result:
        """The result of the first quiet turn, or of the last one that patience allows."""
        while True:
            while self.patience > 0 and not self._calm():
                self.patience -= 0.5
            start, others = time.monotonic(), _others()
            result = action()
            seconds = time.monotonic() - start
            share = (_others() - others) / seconds / (os.cpu_count() or 1)
            self.patience -= seconds
            if share <= self.limit or self.patience < 0:
                self.shares.append(share)
                return result

    def _calm(self) -> bool:
        """Whether the machine stands still for half a second."""
        before = _others()
        time.sleep(0.5)
        return (_others() - before) / 0.5 / (os.cpu_count() or 1) <= self.limit

    def __str__(self) -> str:
        return (f"other processes took {statistics.median(self.shares):.0%} of the machine in the median turn, "
                f"{max(self.shares):.0%} at most")


def _others() -> float:
    """CPU seconds that went to processes other than this one and its ended children; 0 where nothing says so."""
    try:
        counts = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    busy = sum(counts) - counts[3] - counts[4]  # all but idle and waiting for a disk
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def median_ratio(one: Contender, other: Contender) -> float:
    """Median over rounds of other's time over one's: above 1, `one` is faster."""
    return statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows)


def fill(engine: Any) -> None:
    """Fills a new engine's weights on its own device, alike in every call. `Engine.initialize` makes its numbers on one
    core, in float64: minutes for a 7B model, where a benchmark needs no weights of a certain seed."""
    import torch

    random = torch.Generator(engine.device).manual_seed(0)
    for model in engine.models():
        for parameter in model.parameters():
            parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02, generator=random)
    engine.optimizer.reset_master()


def machine() -> dict[str, Any]:
    """Facts that a figure is worth nothing without."""
    import torch

    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {"cpu": facts.get("model name", ""), "bf16": bf16_by(facts.get("flags", "").split()),
            "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "commit": commit.strip(), "date": time.strftime("%Y-%m-%d")}


def bf16_by(flags: Sequence[str]) -> str:
    """What multiplies bf16 on a processor with these flags: it decides how far bf16 is ahead of fp32."""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}
    return next((name for flag, name in known.items() if flag in flags), "no instructions of its own")


def keep(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes a result with the machine's facts; committed when it is worth keeping."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
