"""Every command in README.md and docs/ is typed as it stands, in order, in a copy of the tree; one table makes them
smaller. And every example of a file in docs/ has the keys of one that those commands wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TREE = ("engine", "kernels", "tools", "examples")

COVERED: Mapping[str, str] = {
    "make demo": "tests/launcher/test_demo_runner.py::test_stages_run_in_order_and_say_what_came_out",
    "make test": "tests/docs/test_commands.py::test_a_command_does_what_the_page_says",
    "pip install torch==2.13.0": "tests/packaging/test_packaging.py::test_the_wheel_says_what_it_is",
    "pip install -e '.[hf]'":
        "tests/packaging/test_packaging.py::test_an_installed_copy_finds_kernels_through_the_shim",
    "torchrun --nproc-per-node 8 examples/pretrain_7b.sh --tp 8 --sequence-parallel --data P --tokenizer T":
        "tests/launcher/test_polyglot.py::test_torchrun_starts_as_many_as_it_is_told",
    "NNODES=4 NODE_RANK=0 MASTER_ADDR=host0 "
    "bash examples/pretrain_7b.sh --tp 8 --sequence-parallel --data P --tokenizer T":
        "tests/launcher/test_polyglot.py::test_two_nodes_make_one_world",
    "mpirun -n 8 bash examples/pretrain_7b.sh --tp 8 --sequence-parallel --data P --tokenizer T":
        "tests/train/test_launch.py::test_mpirun_trains_one_run",
}
"""Commands that are not run here, and the test that covers each: they need a network, hours or many GPUs."""

SMALLER = (
    (r"(make_demo_data\.py .*)", r"\1 --megabytes 0.2"),
    (r"--vocab-size 4096", "--vocab-size 600"),
    (r"(pretrain_tiny\.sh .*)",
     r"\1 --steps 3 --seq-len 32 --layers 2 --hidden 64 --ffn-hidden 96 --heads 4 --kv-heads 2"),
    (r"(--resume .*)--steps 240(.*)", r"\1--steps 4\2"),
    (r"(--resume .*)--steps 300(.*)", r"\1--steps 5\2"),
    (r"(finetune_tiny\.sh .*)", r"\1 --steps 2 --seq-len 64"),
    (r"(engine\.generate .*)", r"\1 --max-tokens 8"),
    (r"(engine\.verify .*)", r"\1 --steps 2"),
)
"""All that is changed before a command is run: (pattern, replacement), in order."""

SAYS = (
    (r"convert_ckpt\.py .*--verify$", "logits: equal"),
    (r"inspect_data\.py .*--verify$", "verified: "),
    (r"engine\.verify", "equal"),
    (r"--resume .*--steps 240", "resumed runs/base/checkpoints/step-00000003 at step 3"),
    (r"--resume .*--steps 300", "resumed runs/base/checkpoints/step-00000004 at step 4"),
    (r"engine\.generate", "generated in"),
    (r"--dry-run", "memory of one rank of each stage"),
)
"""What the output of a command must hold: (pattern of the command, text)."""


def commands(page: Path) -> list[str]:
    """The commands in a page's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


ALL = [command for page in PAGES for command in commands(page)]
RUN = [command for command in dict.fromkeys(ALL) if command not in COVERED]


def shrink(command: str) -> str:
    """The command with the sizes of a test."""
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands run."""
    root = tmp_path_factory.mktemp("tree")
    for name in TREE:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def execute(command: str, tree: Path) -> subprocess.CompletedProcess[str]:
    """Types a command into bash at the root of the tree."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1"}
    return subprocess.run(["bash", "-c", command], cwd=tree, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=200)


def test_every_exception_is_still_in_a_page_and_covered_by_a_test_that_exists() -> None:
    assert set(COVERED) <= set(ALL)
    for name in COVERED.values():
        path, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(), name


def test_every_shrinking_and_every_expectation_still_meets_a_command() -> None:
    for pattern, _ in (*SMALLER, *SAYS):
        assert any(re.search(pattern, command) for command in RUN), pattern


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: " ".join(command.split())[:60])
def test_a_command_does_what_the_page_says(command: str, tree: Path) -> None:
    done = execute(shrink(command), tree)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{shrink(command)}\n{output}"
    for pattern, text in SAYS:
        if re.search(pattern, command):
            assert text in output


@pytest.mark.slow
def test_the_run_of_four_processes_is_the_run_of_one(tree: Path) -> None:
    four, one = (losses(tree / "runs" / name / "metrics.jsonl")[:3] for name in ("base", "alone"))
    assert len(one) == 3
    assert four == pytest.approx(one, rel=1e-5)


def losses(path: Path) -> list[float]:
    """The loss of each step of a run."""
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def examples() -> Iterator[tuple[str, Any]]:
    """(file, shortened content) of each `<!-- as in: FILE -->` in the pages."""
    for page in PAGES:
        for path, text in re.findall(r"<!-- as in: (\S+) -->\n```json\n(.*?)```", page.read_text(), flags=re.DOTALL):
            yield path, json.loads(text)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "example"), list(examples()), ids=[path for path, _ in examples()])
def test_an_example_has_the_keys_of_a_real_file(path: str, example: Any, tree: Path) -> None:
    [found, *_] = sorted(tree.glob(path))
    text = found.read_text()
    assert differs(example, json.loads(text.splitlines()[-1] if path.endswith(".jsonl") else text)) is None


def differs(example: Any, real: Any, at: str = "") -> str | None:
    """Where the example is not of the real value's kind; a key `..` stands for all that are left out."""
    if isinstance(example, dict) and isinstance(real, dict):
        shown = set(example) - {".."}
        if not shown <= set(real) or (".." not in example and shown != set(real)):
            return f"{at}: keys {sorted(shown ^ set(real))}"
        found = (differs(example[key], real[key], f"{at}/{key}") for key in sorted(shown))
        return next((fault for fault in found if fault is not None), None)
    if isinstance(example, list) and isinstance(real, list):
        return differs(example[0], real[0], f"{at}/0") if example and real else None
    alike = type(example) is type(real) or {type(example), type(real)} == {int, float}
    return None if alike else f"{at}: {example!r} and {real!r}"


def test_differences_are_found() -> None:
    assert differs({"a": 1, "..": 0}, {"a": 2, "b": 3}) is None
    assert differs({"a": 1}, {"a": 2, "b": 3}) is not None
    assert differs({"a": [{"x": 1}]}, {"a": [{"y": 1}]}) is not None
    assert differs({"a": "x"}, {"a": 1}) is not None
