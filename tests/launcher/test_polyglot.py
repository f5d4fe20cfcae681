"""The recipes are bash and Python in one file. Each form of starting one is run here, on the file as it is, beside an
`engine` that writes down what it was called with."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.sh"))
ODD = ["a b", "$HOME", "*", "it's", 'say "x"', "", "--flag=x y", "back\\slash", "é", "two\nlines", "#no", ";", "`x`"]
RECORDER = '''
import json, os, sys
def main(argv, recipe=(), demo=()):
    argv = [*recipe, *argv]
    check = "--check" in argv
    rank = os.environ.get("RANK")
    seen = {"argv": argv, "rank": rank, "world": os.environ.get("WORLD_SIZE"), "check": check, "cwd": os.getcwd(),
            "engine": os.path.dirname(__file__), "demo": list(demo),
            "signals": os.environ.get("PET_SIGNALS_TO_HANDLE")}
    with open(os.path.join(os.environ["RECORDS"], f"{'check' if check else 'run'}-{rank}.json"), "w") as out:
        json.dump(seen, out)
    return int(os.environ.get("CHECK_CODE" if check else "RUN_CODE", 0))
'''


@dataclass
class Tree:
    """A source tree with one real recipe and the recording engine, and what a start of that recipe left behind."""

    root: Path
    records: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        return self.root / "examples" / "pretrain_tiny.sh"

    def start(self, *command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs `command` in `cwd` (the tree's root by default) with `env` added to a clean environment."""
        return subprocess.run([str(word) for word in command], cwd=cwd or self.root, env=self.env | env,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)

    def seen(self, kind: str = "run") -> list[dict]:
        """What each process of that kind was called with, in rank order."""
        return [json.loads(path.read_text()) for path in sorted(self.records.glob(f"{kind}-*.json"))]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    root = tmp_path / "a tree $x 'with' spaces"
    (root / "examples").mkdir(parents=True)
    (root / "engine").mkdir()
    (root / "engine" / "__init__.py").touch()
    (root / "engine" / "pretrain.py").write_text(RECORDER)
    shutil.copy2(Path(__file__).parents[2] / "examples" / "pretrain_tiny.sh", root / "examples")
    records = tmp_path / "records"
    records.mkdir()
    dropped = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE",
               "PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT")
    dropped += ("RANK", "WORLD_SIZE", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHON",
               "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "RECORDS": str(records), "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1"}
    return Tree(root, records, env)


def check_ranks(tree: Tree, world: int, cwd: Path | None = None) -> None:
    """`world` processes ran, from the tree's own engine, in `cwd`, the caller's odd flags last and intact."""
    ran = tree.seen()
    assert [one["rank"] for one in ran] == [str(rank) for rank in range(world)]
    for one in ran:
        assert one["world"] == str(world)
        assert one["argv"][-len(ODD):] == ODD
        assert one["argv"][:2] == ["--model", "tiny"]
        assert one["argv"][one["argv"].index("--out") + 1] == str(tree.root / "runs" / "pretrain_tiny")
        assert one["engine"] == str(tree.root / "engine")
        assert one["cwd"] == str(cwd or tree.root)


def test_torchrun_starts_one_process_by_itself(tree: Tree) -> None:
    done = tree.start("torchrun", "examples/pretrain_tiny.sh", *ODD)
    assert done.returncode == 0, done.stderr
    check_ranks(tree, 1)
    assert tree.seen("check") == []


def test_torchrun_starts_as_many_as_it_is_told(tree: Tree) -> None:
    done = tree.start("torchrun", "--standalone", "--nproc-per-node", "2", tree.recipe, *ODD)
    assert done.returncode == 0, done.stderr
    check_ranks(tree, 2)


def test_torchrun_without_python_hands_the_file_to_bash_and_starts_no_second_torchrun(tree: Tree) -> None:
    done = tree.start("torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", tree.recipe, *ODD)
    assert done.returncode == 0, done.stderr
    check_ranks(tree, 2)


def test_bash_checks_the_flags_then_starts_torchrun(tree: Tree) -> None:
    done = tree.start("bash", "examples/pretrain_tiny.sh", *ODD, NPROC="2")
    assert done.returncode == 0, done.stderr
    check_ranks(tree, 2)
    [check] = tree.seen("check")
    assert check["rank"] is None
    flags = check["argv"]
    assert flags[flags.index("--world-size") + 1] == "2"
    assert flags[-len(ODD):] == ODD


@pytest.mark.parametrize("way", ["bash", "sh", "itself"])
def test_each_shell_form_works_from_another_folder(tree: Tree, tmp_path: Path, way: str) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    path = os.path.relpath(tree.recipe, elsewhere)
    done = tree.start(*([path] if way == "itself" else [way, path]), *ODD, cwd=elsewhere, NPROC="1")
    assert done.returncode == 0, done.stderr
    check_ranks(tree, 1, elsewhere)


def test_python_runs_the_file_as_one_process(tree: Tree) -> None:
    done = tree.start(sys.executable, tree.recipe, *ODD)
    assert done.returncode == 0, done.stderr
    [one] = tree.seen()
    assert (one["rank"], one["argv"][-len(ODD):]) == (None, ODD)


def test_flags_that_fail_the_check_start_no_torchrun_and_keep_their_exit_code(tree: Tree) -> None:
    done = tree.start("bash", tree.recipe, CHECK_CODE="2")
    assert (done.returncode, tree.seen()) == (2, [])


def test_a_failing_run_fails_the_script(tree: Tree) -> None:
    assert tree.start("bash", tree.recipe, NPROC="1", RUN_CODE="3").returncode == 1  # whatever fails
    assert len(tree.seen()) == 1


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize("env", [STEP, OPEN_MPI, {"PMI_SIZE": "2", "PMI_RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_a_process_of_mpirun_or_srun_is_a_rank_and_starts_no_torchrun(tree: Tree, env: dict[str, str]) -> None:
    done = tree.start("bash", tree.recipe, *ODD, **env)
    assert done.returncode == 0, done.stderr
    [one] = tree.seen()
    assert one["argv"][-len(ODD):] == ODD and tree.seen("check") == [] and one["signals"] is None


@pytest.mark.parametrize("env", [STEP, OPEN_MPI])
def test_ranks_from_two_launchers_are_refused(tree: Tree, env: dict[str, str]) -> None:
    done = tree.start("bash", tree.recipe, NPROC="2", **env)
    assert done.returncode == 2 and "unset NPROC" in done.stderr and done.stderr.count("\n") == 1
    assert tree.seen() + tree.seen("check") == []


def test_sbatch_without_a_step_is_one_process(tree: Tree) -> None:
    done = tree.start("bash", tree.recipe, *ODD, SLURM_PROCID="0", SLURM_NTASKS="4", NPROC="1")
    assert done.returncode == 0, done.stderr
    check_ranks(tree, 1)


def test_torchrun_is_told_of_a_batch_systems_signals(tree: Tree) -> None:
    """It reads the settings, by the names that its own help gives."""
    assert tree.start("bash", tree.recipe, NPROC="1").returncode == 0
    [one] = tree.seen()
    program = ("from torch.distributed.run import get_args_parser; import sys; "
               "found = vars(get_args_parser().parse_args(['x'])); "
               "print(found.get('signals_to_handle'), found.get('shutdown_timeout'))")
    told = tree.start(sys.executable, "-c", program, PET_SIGNALS_TO_HANDLE=one["signals"], PET_SHUTDOWN_TIMEOUT="7")
    assert one["signals"].endswith("SIGUSR1,SIGUSR2")
    assert told.stdout.split() in ([one["signals"], "7"], ["None", "None"]), told.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "--dry-run", "--check"])
def test_what_only_prints_is_one_process_and_knows_the_world_size(tree: Tree, flag: str) -> None:
    done = tree.start("bash", tree.recipe, "--tp", "4", flag, NPROC="8", NNODES="4", RUN_CODE="5", CHECK_CODE="5")
    assert done.returncode == 5
    [one] = tree.seen() + tree.seen("check")
    assert one["rank"] is None
    assert one["argv"][one["argv"].index("--world-size") + 1] == "32"
    assert one["argv"][-3:] == ["--tp", "4", flag]


@pytest.mark.parametrize("env", [{"NPROC": "many"}, {"NNODES": "1:4"}, {"NPROC": "-1"}])
def test_counts_that_are_no_numbers_are_one_line(tree: Tree, env: dict[str, str]) -> None:
    done = tree.start("bash", tree.recipe, **env)
    assert done.returncode == 2
    assert next(iter(env.values())) in done.stderr and len(done.stderr.splitlines()) == 1
    assert tree.seen() + tree.seen("check") == []


def test_several_nodes_need_to_know_which_they_are(tree: Tree) -> None:
    done = tree.start("bash", tree.recipe, NPROC="1", NNODES="2")
    assert done.returncode != 0 and "set NODE_RANK" in done.stderr


def test_two_nodes_make_one_world(tree: Tree) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [subprocess.Popen(["bash", str(tree.recipe), *ODD], cwd=tree.root, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=tree.env | {"NPROC": "1", "NNODES": "2", "NODE_RANK": str(node),
                                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for node in range(2)]
    try:
        assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    check_ranks(tree, 2)


def test_the_environment_of_make_env_is_used_where_no_other_is_active(tree: Tree) -> None:
    python = tree.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexport RUN_CODE=7\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    del tree.env["PYTHON"]
    assert tree.start("bash", tree.recipe, "--dry-run").returncode == 7
    assert tree.start("bash", tree.recipe, "--dry-run", VIRTUAL_ENV="/another").returncode == 0
    assert tree.start("bash", tree.recipe, "--dry-run", PYTHON=sys.executable).returncode == 0


def test_a_recipe_names_the_demo_s_data_apart(tree: Tree) -> None:
    tree.start(sys.executable, tree.recipe)
    [one] = tree.seen()
    assert one["demo"] == ["--data", f"{tree.root}/demo/data/corpus", "--tokenizer", f"{tree.root}/demo/tokenizer",
                           "--valid-data", f"{tree.root}/demo/data/heldout"]
    assert "--data" not in one["argv"]


@pytest.mark.parametrize("words", [["--config", "-"], ["--config=-"]])
def test_a_config_on_standard_input_is_left_for_the_run(tree: Tree, words: list[str]) -> None:
    done = tree.start("bash", tree.recipe, *words, NPROC="1")
    assert done.returncode == 0, done.stderr
    assert len(tree.seen()) == 1 and tree.seen("check") == []


def frame(path: Path) -> str:
    """The bash half of a recipe."""
    return path.read_text().split("import os\n")[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_recipe_has_the_same_frame_is_executable_and_reads_in_both_languages(path: Path) -> None:
    assert frame(path) == frame(EXAMPLES[0])
    assert os.access(path, os.X_OK), f"chmod +x {path}"
    compile(path.read_text(), str(path), "exec")
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", *map(str, EXAMPLES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
