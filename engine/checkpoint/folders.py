"""The folders of a run: step folders, the pointer `latest`, and what a path given to --load means."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
INTENT = ".latest.new"
"""The next `latest`, written before the step folder gets its name. A crash between the two renames leaves it behind,
and readers then follow it: the step it names is whole."""
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""What an HF folder with weights holds, either of them."""
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Resolved:
    """What a path is: `kind` "run" or "step" (then `folder` is the step folder), or "hf"."""

    kind: str
    folder: Path


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def step_folders(root: Path) -> dict[int, Path]:
    """The complete step folders under RUN/checkpoints, by step."""
    if not root.is_dir():
        return {}
    found = {int(match[1]): entry for entry in root.iterdir() if (match := _STEP.fullmatch(entry.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / MANIFEST).is_file()}


def latest_step(run: Path) -> Path | None:
    """The step folder that a run folder's `checkpoints/latest` names; None when the run has no checkpoint."""
    root = Path(run) / "checkpoints"
    for pointer in (root / INTENT, root / LATEST):
        try:
            word = pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{pointer} cannot be read: {error}") from None
        folder = root / word
        if _STEP.fullmatch(word) and (folder / MANIFEST).is_file():
            return folder
        if pointer.name == LATEST:
            raise UserError(f"{pointer} names {word[:80]!r}, which is not a checkpoint there; write the name of "
                            f"one into it: {', '.join(p.name for p in step_folders(root).values()) or 'there is none'}")
    steps = step_folders(root)
    if steps:
        raise UserError(f"{root} has {len(steps)} checkpoints and no file `latest`; write a name into it, such as "
                        f"{max(steps.items())[1].name}")
    return None


def resolve(path: Path | str) -> Resolved:
    """What `path` is: a run folder (its latest step), a step folder, or a Hugging Face folder; else UserError."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a run folder, a step folder or a Hugging Face folder")
    if (folder / MANIFEST).is_file():
        return Resolved("step", folder)
    if (folder / "checkpoints").is_dir():
        step = latest_step(folder)
        if step is None:
            raise UserError(f"{folder} is a run folder without a checkpoint")
        return Resolved("run", step)
    if (folder / "config.json").is_file() and any((folder / name).exists() for name in HF_WEIGHTS):
        return Resolved("hf", folder)
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(folder.glob(pattern)):
            raise UserError(f"{folder} holds its weights as pickles ({pattern}), which can run code and are not read; "
                            "save the model as safetensors")
    raise UserError(f"{folder} is not a checkpoint: it has neither checkpoints/, {MANIFEST}, nor config.json with "
                    f"{' or '.join(HF_WEIGHTS)}")


def announce(root: Path, folder: str) -> None:
    """Writes down that `folder` is about to become the latest."""
    path = root / INTENT
    path.write_text(folder + "\n", encoding="utf-8")
    sync(path)


def publish(root: Path) -> None:
    """Moves `latest` to the announced folder."""
    os.replace(root / INTENT, root / LATEST)
    sync(root)


def prune(root: Path, keep: int, latest: Path) -> None:
    """Deletes all but the newest `keep` step folders (0 keeps all), never `latest`; what resists stays."""
    for folder in list(step_folders(root).values())[:-keep] if keep else []:
        if folder != latest:
            gone = root / f".old-{folder.name}"
            try:
                os.rename(folder, gone)  # first out of sight: a half-deleted step must not look like one
            except OSError:
                continue
            shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """Forces a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
