"""A disk that is full ends every tool with one line that names the place, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine.data.preprocess import Settings, prepare

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 4096


def full(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a tool where no file may grow beyond LIMIT bytes."""
    command = [sys.executable, "-B", str(ROOT / "tools" / tool), *map(str, arguments)]
    limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))  # noqa: E731
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)


def test_a_full_disk_is_one_line_of_every_tool(vocabulary: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    texts = [f"text {n} of the cat on the mat {n * 7919**3:x}" for n in range(800)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("one", "two"):
        prepare(Settings(inputs=[str(source)], tokenizer=vocabulary, output_prefix=str(tmp_path / name)),
                lambda line: None)
    before = {path.name for path in tmp_path.iterdir()}
    for tool, arguments, place in (
        ("merge_datasets.py", ["--input", tmp_path / "one", tmp_path / "two", "--output-prefix", tmp_path / "all"],
         "cannot write .*/all: File too large; nothing of it is left"),
        ("preprocess_data.py", ["--input", source, "--tokenizer", vocabulary, "--output-prefix", tmp_path / "three"],
         "cannot write to .*/three.work: File too large"),
        ("train_tokenizer.py", ["--input", source, "--vocab-size", "310", "--output", tmp_path / "v"],
         "cannot write to .*: File too large"),
    ):
        done = full(tool, *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and re.search(place, lines[0])
        assert {path.name for path in tmp_path.iterdir()} == before
