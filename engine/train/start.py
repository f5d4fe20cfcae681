"""What a run starts from: nothing, the weights of a folder (--load), or a checkpoint of its own (--resume)."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import Checkpoint, Resolved, latest_step, open_checkpoint, resolve, step_folders
from engine.checkpoint.folders import later_steps
from engine.config import ModelConfig, RunConfig
from engine.config.flags import Values, to_dict
from engine.data.fingerprint import Fingerprint, difference
from engine.errors import UserError, shown
from engine.hf import read_config
from engine.train.schedule import learning_rate

ONE_RUN = ("stop_after", "resume", "resume_from", "out", "new_data", "verify_data")
"""What was asked of the run that wrote a checkpoint, and not of the one that resumes it."""

ENDS = 1 << 20
"""Bytes at the end of a weight file by which it is known."""


@dataclass(frozen=True)
class Start:
    """Where weights come from. `weights`: the folder of --load; `checkpoint`: the opened step of either, None for a
    Hugging Face folder; `resume`: that step's folder where the run goes on from it."""

    weights: Resolved | None = None
    checkpoint: Checkpoint | None = None
    resume: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder it starts from."""
        return self.resume or (self.weights.folder if self.weights else Path())

    def model(self) -> ModelConfig | None:
        """The model that is loaded; None for a new one."""
        if self.checkpoint is not None:
            return self.checkpoint.run_config().model
        return read_config(self.weights.folder) if self.weights is not None else None

    def content(self) -> dict[str, Any]:
        """What tells these weights from others, wherever they lie. Each rank looks for them by itself: it must not
        find a checkpoint that a run has written since the others looked."""
        if self.checkpoint is not None:
            sums = repr(sorted(self.checkpoint.tensors.items()))  # with the checksum of each slice
            return {"step": self.checkpoint.step, "crc32": zlib.crc32(sums.encode())}
        return {"files": _ends(self.weights.folder)} if self.weights is not None else {}


def _ends(folder: Path) -> dict[str, list[int]]:
    """Size of each weight file of a Hugging Face folder, and the crc32 of its end: other weights end differently."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - ENDS))
            found[path.name] = [size, zlib.crc32(file.read())]
    return found


def find_start(under: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Values, Start]:
    """The values of a run, `given` over `under`, and what it starts from. With --resume the saved config stands between
    them, since a run may have been started with more than its recipe says; --load then has been done already."""
    asked = {**under, **given}
    step = _resumed_step(asked)
    if step is not None:
        checkpoint = open_checkpoint(step)
        saved = {name: value for name, value in _flat(checkpoint.run_config()) if name not in ONE_RUN}
        values = {**under, **saved, **given, "out": asked["out"], "resume": True, "resume_from": None}
        return values, Start(checkpoint=checkpoint, resume=step)
    if not asked.get("load"):
        return asked, Start()
    if "load" not in given and not Path(str(asked["load"])).exists():
        raise UserError(f"{shown(asked['load'])}, the model that this recipe tunes, is not there: `make demo` makes "
                        "it; or give the folder of another one with --load")
    weights = resolve(str(asked["load"]))
    return asked, Start(weights, None if weights.kind == "hf" else open_checkpoint(weights.folder))


def _resumed_step(asked: Mapping[str, Any]) -> Path | None:
    """The step folder to go on from; None for a run that begins."""
    wanted = asked.get("resume_from")
    if not asked.get("resume") and wanted is None:
        return None
    out = str(asked.get("out", ""))
    if not out:
        raise UserError("--resume continues the run in --out; give its folder")
    if wanted is None:
        return latest_step(Path(out))
    steps = step_folders(Path(out) / "checkpoints")
    if wanted not in steps:
        there = ", ".join(str(step) for step in steps)
        raise UserError(f"--resume-from {wanted}: {shown(out)} has no checkpoint of that step; "
                        f"{'it has those of ' + shown(there) if steps else 'it has none'}")
    return steps[wanted]


def start_notes(start: Start, config: RunConfig) -> list[str]:
    """What whoever resumes shall know before the first step: what is set aside, what is not as it was."""
    if start.checkpoint is None or start.resume is None:
        return []
    notes = []
    step = start.checkpoint.step
    later = later_steps(start.resume.parent, step)
    if later and step < config.batch.steps:
        names = shown(", ".join(path.name for path in later))
        notes.append(f"going back to step {step}: set aside, with .old added to the name: {names}")
    then = start.checkpoint.run_config()
    changed = [f"--{name.replace('_', '-')} {shown(old, 80)} -> {shown(new, 80)}" for (name, old), (_, new) in
               zip(_flat(then), _flat(config), strict=True) if old != new and name not in ONE_RUN]
    if changed:
        notes.append(f"changed since the checkpoint: {', '.join(changed)}")
    return notes + _schedule_note(then, config, step)


def _schedule_note(then: RunConfig, now: RunConfig, step: int) -> list[str]:
    """The learning rate's old and new course, where they part."""
    for later in range(step, now.batch.steps):
        old = learning_rate(then.optimizer, later, then.batch.steps)
        new = learning_rate(now.optimizer, later, now.batch.steps)
        if old != new:
            return [f"the learning-rate schedule has changed: at step {later + 1} the rate is {new:.4g}, and was to be "
                    f"{old:.4g}; {_course(now)}, and was {_course(then)}"]
    return []


def _course(config: RunConfig) -> str:
    """A schedule in words."""
    optimizer = config.optimizer
    course = f"--lr {optimizer.lr:g} --warmup {optimizer.warmup} --decay {optimizer.decay}"
    if optimizer.decay == "constant":
        return course
    low = learning_rate(optimizer, max(config.batch.steps, optimizer.warmup), config.batch.steps)
    return f"{course} to {low:.4g} at --steps {config.batch.steps}"


def _flat(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every leaf of a config."""
    for group in to_dict(config).values():
        yield from group.items()


def same_data(data: Fingerprint, start: Start) -> None:
    """Sample k of another corpus is another sample: who resumes on one shall mean it."""
    if start.checkpoint is None or start.resume is None:
        return
    then = start.checkpoint.meta.get("data")
    differs = difference(then, data) if then is not None else None  # checkpoints once told nothing
    if differs is not None:
        raise UserError(f"{shown(start.resume)} goes on with other data: {differs}; give --data as it was, or "
                        "--new-data to go on with these")
