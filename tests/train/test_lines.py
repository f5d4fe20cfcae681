"""The lines of a run folder: what is damaged is cut, what is missing is said, what is sound stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from engine.checkpoint import alone
from engine.checkpoint.background import BackgroundSave
from engine.errors import UserError
from engine.train.callbacks import StepRecord
from engine.train.lines import JsonLines


def line(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 1.5 / step}).encode() + b"\n"


def lines(*steps: int) -> bytes:
    return b"".join(map(line, steps))


def record(step: int) -> StepRecord:
    known = {name: 0 for name in StepRecord.__dataclass_fields__ if name != "valid_loss"}
    return StepRecord(**{**known, "step": step})  # type: ignore[arg-type]


def opened(path: Path, step: int) -> JsonLines:
    return JsonLines(path, step, lambda record: {"step": record.step, "loss": 1.5 / record.step})


CASES: dict[str, tuple[bytes, bytes, str | None]] = {
    "whole": (lines(1, 2, 3, 4), lines(1, 2, 3, 4), None),
    "later steps": (lines(1, 2, 3, 4, 5, 6), lines(1, 2, 3, 4), None),
    "no newline": (lines(1, 2, 3, 4)[:-1], lines(1, 2, 3, 4), None),
    "torn end": (lines(1, 2, 3, 4)[:-5], lines(1, 2, 3), "1 damaged line cut; no line is left of step 4"),
    "torn later step": (lines(1, 2, 3, 4, 5)[:-5], lines(1, 2, 3, 4), "1 damaged line cut; steps 1-4 are whole"),
    "zeros": (lines(1, 2) + b"\0" * 4096, lines(1, 2), "1 damaged line cut; no line is left of step 3-4"),
    "zeros, then a line": (lines(1, 2) + b"\0" * 999 + lines(3, 4), lines(1, 2, 4),
                           "1 damaged line cut; no line is left of step 3"),
    "a flipped bit in a key": (lines(1) + line(2).replace(b"step", b"stdp") + lines(3, 4), lines(1, 3, 4),
                               "1 damaged line cut; no line is left of step 2"),
    "a flipped bit in a step": (lines(1, 2) + b'{"step": 7, "loss": 1}\n' + lines(4), lines(1, 2, 4),
                                "no line is left of step 3"),
    "a step among its neighbours": (lines(1) + b'{"step": 4}\n' + lines(3, 4), lines(1, 3, 4),
                                    "1 damaged line cut; no line is left of step 2"),
    "a step that repeats": (lines(1, 2, 2, 3, 4), lines(1, 2, 3, 4), "1 damaged line cut; steps 1-4 are whole"),
    "not UTF-8": (b"\xff\xfe\n" + lines(2, 3, 4), lines(2, 3, 4), "1 damaged line cut; no line is left of step 1"),
    "other JSON": (b'[]\n7\nnull\n{"step": true}\n{"step": -1}\n' + b"[" * 100_000 + b"\n" + lines(1, 2, 3, 4),
                   lines(1, 2, 3, 4), "6 damaged lines cut; steps 1-4 are whole"),
    "empty": (b"", b"", "no line is left of step 1-4"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_cut_and_said_and_the_run_goes_on(tmp_path: Path, case: str) -> None:
    held, kept, words = CASES[case]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(held)
    found = opened(path, 4)
    assert path.read_bytes() == kept
    assert found.note == (None if words is None else f"{path}: {words}")
    found.after_step(record(5), False)
    assert path.read_bytes() == kept + line(5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    assert opened(tmp_path / "new", 0).note is None
    assert opened(tmp_path / "gone", 4).note == f"{tmp_path / 'gone'} is not there: it begins at step 5"


def test_lines_are_on_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    found = opened(path, 0)
    seen: list[object] = []
    sound, rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        seen.append(path.read_bytes() if os.path.sameopenfile(handle, found.file.fileno()) else None)
        sound(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda source, target: (seen.append("named"), rename(source, target)))
    for step in (1, 2):
        found.after_step(record(step), False)
    saver = BackgroundSave(tmp_path / "checkpoints", rank=0, world=1, agree=alone, device=torch.device("cpu"))
    saver.save(2, [], meta={}, assets={}, before=found.sync)
    saver.finish()
    assert [item for item in seen if item is not None] == [lines(1, 2), "named"]


def test_a_file_that_was_replaced_or_deleted_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    found = opened(path, 0)
    found.after_step(record(1), False)
    (tmp_path / "edited").write_bytes(path.read_bytes())
    os.replace(tmp_path / "edited", path)  # as editors do
    found.after_step(record(2), False)
    assert path.read_bytes() == lines(1, 2)
    path.unlink()
    found.after_step(record(3), False)
    assert path.read_bytes() == lines(3)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    found = opened(tmp_path / "metrics.jsonl", 0)
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    found.path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device; .* --resume"):
        found.after_step(record(1), False)
