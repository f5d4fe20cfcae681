"""The chain that is attacked, made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Chain:
    """A folder with corpus.bin/.idx, tokenizer/, rows.jsonl, run/ (pretrained) and tuned/; and the fields of the config
    that each entry point read while it was made."""

    folder: Path
    reads: dict[str, set[str]]


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("chain.py")), str(folder)], env=env, cwd=folder,
                          capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    reads = json.loads((folder / "reads.json").read_text())
    return Chain(folder, {entry: set(names) for entry, names in reads.items()})
