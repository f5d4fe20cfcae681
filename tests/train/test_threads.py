"""The threads of a rank on a CPU: its share of the cores, and twice of it, asleep where it waits, in a pipeline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine.train import threads
from engine.train.place import Place
from engine.train.threads import openmp, threads_of

CPU = ["--device", "cpu"]
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN = {**RANK, "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
TWICE = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
APART = {**RANK, "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "other"}


@pytest.mark.parametrize("env", [RANK, TORCHRUN], ids=["ranks", "torchrun"])
@pytest.mark.parametrize("flags", [["--pp", "2"], ["--pp=2"], ["--pp", "1", "--pp", "2"]], ids=" ".join)
def test_stages_of_a_pipeline_get_twice_their_share_asleep(env: dict[str, str], flags: list[str]) -> None:
    assert openmp([*flags, *CPU], [], env, cores=2) == TWICE
    assert openmp([*flags, *CPU], [], env, cores=17) == {**TWICE, "OMP_NUM_THREADS": "16"}


@pytest.mark.parametrize(("flags", "env"), [
    (["--tp", "2"], RANK), (["--pp", "2", "--pp", "1"], RANK), (["--pp", "2"], {}), (["--pp", "2"], APART),
    (["--pp", "2", "--device", "cuda"], RANK), (["--pp", "2", "--config", "-"], RANK), (["--pp", "x"], RANK),
    (["--pp", "2", "--nonsense"], RANK), (["--pp", "2"], {**RANK, "WORLD_SIZE": "x"}),
    *[(["--pp", "2"], {**RANK, name: "2"}) for name in ("OMP_NUM_THREADS", *threads.WAITING)],
    (["--pp", "2"], {**RANK, "OMP_NUM_THREADS": "1"})], ids=str)
def test_nothing_is_set_for_other_layouts_nor_over_the_user(flags: list[str], env: dict[str, str]) -> None:
    assert openmp([*CPU, *flags], [], env, cores=2) == {}


def test_more_ranks_than_cores_are_left_alone() -> None:
    assert openmp(["--pp", "2", *CPU], [], RANK, cores=1) == {}


def test_where_a_gpu_is_the_cpus_threads_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "GPU", tmp_path)
    assert openmp(["--pp", "2"], [], RANK, cores=2) == {}
    assert openmp(["--pp", "2", *CPU], [], RANK, cores=2) == TWICE
    monkeypatch.setattr(threads, "GPU", tmp_path / "none")
    assert openmp(["--pp", "2"], [], RANK, cores=2) == TWICE


def test_the_layout_may_come_from_a_recipe_a_config_or_the_resumed_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("parallel: {pp: 2}\nruntime: {device: cpu}\n")
    config, out = ["--config", str(tmp_path / "config.yaml")], ["--out", str(tmp_path)]
    assert openmp(CPU, ["--pp", "2"], RANK, cores=2) == TWICE
    assert openmp(config, [], RANK, cores=2) == TWICE
    assert openmp([*config, "--pp", "1"], ["--pp", "2"], RANK, cores=2) == {}
    assert openmp(["--resume"], out, RANK, cores=2) == TWICE
    assert openmp(["--resume", "--pp", "1", *out], [], RANK, cores=2) == {}
    assert openmp([*CPU, *out], [], RANK, cores=2) == {}


def test_a_rank_computes_with_its_share_unless_somebody_has_said_otherwise() -> None:
    alone, four = Place(0, 1, 0, 1), Place(0, 4, 0, 4)
    assert [threads_of(four, {}, cores) for cores in (2, 4, 9)] == [1, 1, 2]
    assert threads_of(four, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 8) == 2
    assert threads_of(four, {"OMP_NUM_THREADS": "1"}, 8) is None
    assert threads_of(four, {"OMP_WAIT_POLICY": "active"}, 8) == 2
    assert threads_of(alone, {}, 8) is None


def test_a_system_that_binds_no_process_to_cores_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.cores_here() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.cores_here() == os.cpu_count()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks have no core each")
def test_the_threads_are_settled_before_torch_is_imported() -> None:
    look = ("import sys; from engine.train.threads import share_cores; share_cores(['--pp', '2', '--device', 'cpu']); "
            "assert 'torch' not in sys.modules; import os; print(os.environ['OMP_WAIT_POLICY'])")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    env |= RANK
    done = subprocess.run([sys.executable, "-c", look], cwd=runs.ROOT, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("passive\n", "")


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks have no core each")
def test_a_run_of_two_stages_says_its_threads(tmp_path: Path) -> None:
    flags = [*runs.MODEL, *runs.write_corpus(tmp_path / "corpus"), "--pp", "2", "--steps", "1", *CPU]
    run = runs.torchrun(tmp_path / "out", flags, world=2)
    try:
        assert run.codes() == [0], run.said()
    finally:
        run.kill()
    [number] = re.findall(r" (\d+) threads a process", run.said())
    assert int(number) == 2 * (len(os.sched_getaffinity(0)) // 2)
