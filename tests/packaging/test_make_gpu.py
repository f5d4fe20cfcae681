"""`make gpu` without a GPU: its Pythons are stand-ins that say whether they see one, note commands, and may fail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
case "$*" in
  *torch.cuda.is_available*) exit %d ;;
  *"import xdist"*) exit 0 ;;
esac
echo "$(basename "$0") $*" >> "$NOTES"
echo "said by $*"
for word in $FAILS; do case "$*" in *"$word"*) exit 1 ;; esac; done
"""
FIRST, TEST, BENCH, RACES = ("benchmarks/first_run.py", "-m pytest tests/kernels -m gpu", "benchmarks/kernels.py",
                             "benchmarks/sanitize.py")


def stand_in(path: Path, sees: bool) -> Path:
    """A Python whose torch sees a GPU, or does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN % (0 if sees else 1))
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with a Makefile, on a machine whose python3 sees a GPU."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    stand_in(tmp_path / "bin" / "python3", sees=True)
    return tmp_path


def make(tree: Path, *words: str, fails: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs make; what it said, and the commands that a Python was given."""
    notes = tree / "notes"
    notes.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env |= {"PATH": f"{tree / 'bin'}:{env['PATH']}", "NOTES": str(notes), "FAILS": fails}
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=tree, env=env, capture_output=True, text=True)
    return done, notes.read_text().splitlines() if notes.exists() else []


@pytest.mark.parametrize(("fails", "named"), [
    ("", ""), ("first_run", "gpu-first"), ("sanitize", "gpu-races"), ("pytest kernels.py", "gpu-test gpu-bench")])
def test_a_step_that_fails_is_named_and_the_next_one_runs(tree: Path, fails: str, named: str) -> None:
    done, commands = make(tree, "gpu", fails=fails)
    assert len(commands) == 4 and all(part in command for part, command in
                                      zip((FIRST, TEST, BENCH, RACES), commands, strict=True)), commands
    assert (done.returncode != 0) == bool(named), done.stderr
    assert done.stdout.splitlines()[-1] == f"make gpu: {f'failed: {named}' if named else 'nothing failed'}"


def test_results_and_all_that_is_said_go_where_save_says(tree: Path) -> None:
    done, commands = make(tree, "gpu", "SAVE=out/of it", fails="sanitize")
    first, _, bench, _ = commands
    assert first.endswith(f"{FIRST} --save out/of it") and bench.endswith(f"{BENCH} --save out/of it")
    log = (tree / "out" / "of it" / "gpu.log").read_text().splitlines()
    assert [line.startswith("said by") for line in log] == [True] * 4 + [False]
    assert log[-1] == "make gpu: failed: gpu-races" and done.returncode != 0
    _, [alone] = make(tree, "gpu-bench")
    assert alone.endswith(f"{BENCH} --save")


def test_a_failure_is_none_the_less_one_where_its_words_are_kept(tree: Path) -> None:
    for step in ("first", "test", "bench", "races"):
        done, commands = make(tree, f"gpu-{step}", "SAVE=out", fails="benchmarks pytest")
        assert done.returncode != 0 and len(commands) == 1


def test_peers_workers_rounds_and_steps_are_chosen(tree: Path) -> None:
    words = ("STEPS=test bench", "JOBS=10", "PEERS=eager,sdpa", "ROUNDS=3", "ONLY=norm rope")
    _, [test, bench] = make(tree, "gpu", *words)
    assert test.endswith(f"{TEST} -n 10 --dist worksteal")
    assert bench.endswith(f"{BENCH} --save --only norm rope --peers eager,sdpa --rounds 3")


def test_the_python_is_the_first_that_sees_a_gpu_and_none_is_built(tree: Path) -> None:
    def taken(*words: str) -> str:
        _, [command] = make(tree, "gpu-first", *words)
        return command.split()[0]

    assert taken() == "python3" and not (tree / ".venv").exists()
    stand_in(tree / ".venv" / "bin" / "python", sees=False)
    assert taken() == "python3"
    stand_in(tree / ".venv" / "bin" / "python", sees=True)
    assert taken() == "python"
    other = stand_in(tree / "bin" / "other", sees=True)
    assert taken(f"PY={other}") == "other"
    stand_in(other, sees=False)
    done, commands = make(tree, "gpu", f"PY={other}")
    assert not commands and done.returncode == 0
    assert done.stdout == "make gpu: no torch that sees a CUDA GPU here, nothing was run\n"
