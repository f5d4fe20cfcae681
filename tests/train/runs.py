"""Real runs for tests: a small corpus, processes that train on it, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from forked import Forked

from engine.checkpoint import open_checkpoint
from engine.checkpoint.folders import step_folders
from engine.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
MODEL = ("--layers 4 --hidden 32 --ffn-hidden 64 --heads 4 --kv-heads 2 --vocab-size 101 --seq-len 32 --global-batch 4 "
         "--micro-batch 2 --lr 1e-2 --warmup 3").split()
TP2_PP2 = ["--tp", "2", "--pp", "2"]
BAD_INPUT, CRASHED = 2, 1


def write_corpus(prefix: Path, *, tokens: int = 2000, bad: bool = False) -> list[str]:
    """Writes a corpus of random documents; `bad` puts an id past the vocabulary in its middle. Returns its flags."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, 65000 if bad else 101) as writer:
        for start in range(0, tokens, 50):
            ids = rng.integers(0, 101, 50)
            if bad and start == tokens // 2:
                ids[25] = 60000
            writer.add_document(ids)
        writer.finish()
    return ["--data", str(prefix)]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher would have set, one thread a process."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **more}


def pretrain(*flags: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m engine.pretrain` on one process, to its end."""
    return to_the_end("-m", "engine.pretrain", *flags, cwd=cwd, **env)


def to_the_end(*program: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """`python PROGRAM...` in one process, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = Forked([str(word) for word in program], env=environment(**env), cwd=cwd, out=out, err=err)
        try:
            code = process.wait(120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(program, code, out.read_text(), err.read_text())


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Run:
    """Ranks under way: under torchrun (`launcher`), or each started by us."""

    out: Path
    launcher: subprocess.Popen[str] | None
    ranks: list[Forked]
    log: Path

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl so far."""
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_step(self, step: int) -> None:
        """Returns once a step has been written down."""
        until(lambda: any(line["step"] >= step for line in self.metrics()) or self.all_ended(), 200)
        assert not self.all_ended(), self.said()

    def pids(self) -> list[int]:
        """The ranks' process ids, by rank."""
        if self.launcher is None:
            return [rank.pid for rank in self.ranks]
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                env = (path.parent / "environ").read_bytes().split(b"\0") if parent == self.launcher.pid else []
            except OSError:
                continue
            rank = [item[5:] for item in env if item.startswith(b"RANK=")]
            if rank:
                found[int(rank[0])] = int(path.parent.name)
        return [found[rank] for rank in sorted(found)]

    def started(self) -> Sequence[subprocess.Popen[str] | Forked]:
        """What was started by us."""
        return [self.launcher] if self.launcher else self.ranks

    def all_ended(self) -> bool:
        """Whether everything that was started has ended."""
        return all(process.poll() is not None for process in self.started())

    def codes(self) -> list[int | None]:
        """Exit codes: torchrun's, or the ranks'."""
        return [process.wait(200) for process in self.started()]

    def said(self) -> str:
        """Everything printed so far."""
        return self.log.read_text()

    def kill(self) -> None:
        """Ends what is left, so that a failed test leaves nothing behind."""
        for pid in self.pids():
            if alive(pid):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        if self.launcher is not None:
            self.launcher.kill()
        for process in self.started():
            process.wait(30)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Waits until something is true; returns whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def torchrun(out: Path, flags: Sequence[str], *, world: int = 4, program: Sequence[str] = ("-m", "engine.pretrain"),
             env: Mapping[str, str] = {}) -> Run:  # noqa: B006  read only
    """Starts `torchrun -m engine.pretrain`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *program,
               *flags, "--out", str(out)]
    log = out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
    with open(log, "w") as sink:
        launcher = subprocess.Popen(command, stdout=sink, stderr=sink, text=True, env=environment(**env), cwd=ROOT)
        return Run(out, launcher, [], log)


def by_hand(rank: int, world: int, port: str) -> dict[str, str]:
    """What a script sets that starts ranks itself."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def slurm_step(rank: int, world: int, port: str) -> dict[str, str]:
    """What srun sets for a task of a step on one node."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(world),
            "SLURM_NTASKS": str(world), "SLURM_STEP_NODELIST": "node07", "SLURM_JOB_ID": port, "SLURM_STEP_ID": "0"}


def start_ranks(out: Path, flags: Sequence[str], *, world: int = 4, program: Sequence[str] = ("-m", "engine.pretrain"),
                env: Mapping[str, str] = {},  # noqa: B006  read only
                launcher: Callable[[int, int, str], dict[str, str]] = by_hand) -> Run:
    """Starts each rank by itself, as mpirun or srun would: no launcher ends the others when one dies."""
    return start_program(out, [*program, *flags, "--out", str(out)], world=world, env=env, launcher=launcher)


def start_program(out: Path, command: Sequence[str], *, world: int = 4,
                  env: Mapping[str, str] = {},  # noqa: B006  read only
                  launcher: Callable[[int, int, str], dict[str, str]] = by_hand) -> Run:
    """Starts `python COMMAND...` once a rank; what they print goes into one file beside `out`."""
    port = str(free_port())
    log = out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
    log.touch()
    ranks = [Forked(command, env=environment(**launcher(rank, world, port), **env), cwd=ROOT, out=log, err=log)
             for rank in range(world)]
    return Run(out, None, ranks, log)


def losses(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of metrics.jsonl, with all digits."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Two runs are equal: every loss to its last digit, every sample, every bit of the last checkpoint."""
    assert losses(found) == losses(wanted)
    assert (found / "samples.jsonl").read_text() == (wanted / "samples.jsonl").read_text()
    last, other = (max(step_folders(out / "checkpoints").items())[1] for out in (found, wanted))
    assert last.name == other.name
    a, b = open_checkpoint(last), open_checkpoint(other)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        start = tuple(0 for _ in tensor.shape)
        assert a.read(name, start, tensor.shape).equal(b.read(name, start, tensor.shape)), name
