"""Terminals, pipes and signals: what only a process of its own shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
COMMANDS = {**{name: ["-m", f"engine.{name}"] for name in ("pretrain", "finetune", "verify", "generate")},
            **{path.stem: [str(path)] for path in TOOLS}}
HELP = "--help"
SMALL = "--hidden 32 --heads 4 --kv-heads 2 --layers 1 --vocab-size 640 --seq-len 32 --global-batch 2".split()


def environment(**more: str) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def start(program: str, flags: Sequence[str], **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *COMMANDS[program], *flags], env=environment(**env), cwd=ROOT,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(program: str, flags: Sequence[str], **env: str) -> tuple[int, bytes, bytes]:
    process = start(program, flags, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def most_in_soak(names: Sequence[str], quick: Sequence[str]) -> list[Any]:
    """Test parameters of which `quick` are merely slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in quick else pytest.mark.soak) for name in names]


@pytest.mark.parametrize("program", most_in_soak(list(COMMANDS), ["pretrain", "merge_datasets"]))
def test_ctrl_c_while_modules_are_read_ends_without_a_traceback(program: str) -> None:
    process = start(program, [HELP])
    deadline = time.monotonic() + 60
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():  # the first of the slow ones
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and b"Traceback" not in err, err


@pytest.mark.parametrize("program", most_in_soak(list(COMMANDS), ["verify"]))
def test_a_reader_that_goes_away_is_no_error(program: str) -> None:
    process = start(program, [HELP])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), err) == (0, b"")


@pytest.mark.soak
@pytest.mark.parametrize("program", COMMANDS)
def test_a_full_disk_behind_the_output_is_one_line(program: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, *COMMANDS[program], HELP], env=environment(), cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert done.stderr == b"error: standard output cannot be written: No space left on device\n", done.stderr


@pytest.mark.parametrize("flush", [True, False])
def test_a_full_output_is_not_taken_for_the_disk_that_is_written_to(flush: bool) -> None:
    code = f"""
from engine.errors import UserError, run_cli
def main(argv):
    try:
        print("half way", flush={flush})
    except OSError as error:
        raise UserError(f"out/ cannot be written: {{error.strerror}}")
    return 0
run_cli(main)
"""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, timeout=120)
    assert done.stderr == b"error: standard output cannot be written: No space left on device\n", done.stderr
    assert done.returncode == 2


@pytest.mark.slow
def test_what_the_terminal_cannot_show_is_replaced() -> None:
    code, out, err = run("pretrain", ["--model", "tiny", "--data", "é中", "--dry-run"], PYTHONIOENCODING="ascii")
    assert (code, err) == (0, b"")
    assert b"1 process" in out and b"no dataset at" in out and out.isascii()


@pytest.mark.soak
def test_a_prompt_is_read_whatever_the_locale_says(chain: Any) -> None:
    flags = ["--load", str(chain.folder / "run"), "--prompt", "é中", "--greedy", "--max-tokens", "4"]
    usual = run("generate", flags, PYTHONUTF8="1")
    assert usual[0] == 0, usual[2]
    posix = run("generate", flags, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert posix[0] == 0 and posix[1].decode("ascii", "replace").replace("\ufffd", "?") == "".join(
        character if ord(character) < 128 else "?" for character in usual[1].decode()), (posix, usual)
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run([sys.executable, "-m", "engine.generate", *flags[:2], "--prompt", "-"], env=environment(),
                              stdin=endless, capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and b"longer than 16 MiB" in done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.sh")), ids=lambda path: path.stem)
@pytest.mark.parametrize(("flags", "words"), [
    (["--lora", "8"], b"LoRA is not there yet"), (["--data", "x" * 256], b""), (["--config", "/dev/zero"], b"1 MiB"),
    (["--tp", "3"], b""), (["--timeout", "1e18"], b"a year"), (["--out", "/dev/null/x"], b""),
])
def test_the_bash_form_of_a_recipe_refuses_in_one_line(recipe: Path, flags: list[str], words: bytes,
                                                       tmp_path: Path) -> None:
    env = environment(PYTHON=sys.executable, NPROC="2")
    done = subprocess.run(["bash", str(recipe), "--out", str(tmp_path / "out"), *flags], env=env, cwd=tmp_path,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b""), done
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    assert words in done.stderr or b"--load" in done.stderr or b"is not a folder" in done.stderr  # a demo not made yet
    assert not list(tmp_path.iterdir())


def test_a_run_whose_output_is_closed_trains(chain: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.pretrain", *SMALL, "--data", str(chain.folder / "corpus"),
               "--steps", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], env=environment(), cwd=ROOT, timeout=120,
                          stderr=subprocess.PIPE)
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()
