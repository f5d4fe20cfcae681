"""The folders of a run: step folders, the pointer `latest`, and what a path given to --load means."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
OLD = ".old-"
"""Begins the name of a step that is being deleted."""
INTENT = ".latest.new"
"""The next `latest`, written before the step folder gets its name. A crash between the two renames leaves it behind,
and readers then follow it: the step it names is whole."""
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""What an HF folder with weights holds, either of them."""
LOCK = ".lock"
"""A file of the run folder, locked as long as a run writes there."""
TRIES = 20
"""How often a reader looks for the latest step of a run that deletes each before it is held."""
_STEP = re.compile(r"step-(\d{8,})")


class Hold:
    """A lock on a step folder that many readers may have at once and `prune` respects; it ends with the object."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where the step is gone, or is about to go."""
        path = folder / MANIFEST
        self.handle: int | None = None
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise
        except BlockingIOError:
            self.release()
            raise FileNotFoundError(path) from None
        except OSError:
            return  # a file system without locks; who cannot read the manifest is told so when he opens it
        if not path.exists():  # by name: some network file systems do not keep a file's number
            self.release()
            raise FileNotFoundError(path)

    def release(self) -> None:
        """Ends the lock, in forked processes too."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    __del__ = release


@dataclass(frozen=True)
class Resolved:
    """What a path is: `kind` "run" or "step" (then `folder` is the step folder), or "hf". As long as it lives, or until
    `release`, no run's --keep deletes the step."""

    kind: str
    folder: Path
    hold: Hold | None = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        """Lets the step be deleted: all of it has been read."""
        if self.hold is not None:
            self.hold.release()


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def named_step(name: str) -> int | None:
    """The step of a folder's name; None where it is not a step folder's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> dict[int, Path]:
    """The complete step folders under RUN/checkpoints, by step."""
    if not root.is_dir():
        return {}
    found = {step: entry for entry in root.iterdir() if (step := named_step(entry.name)) is not None}
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
            raise UserError(f"{pointer} cannot be read: {getattr(error, 'strerror', None) or error}") from None
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
        if folder.parent.name == "checkpoints":
            repair(folder.parent.parent)
        try:
            return Resolved("step", folder, Hold(folder))
        except FileNotFoundError:
            raise UserError(f"{folder} is being deleted by the run that wrote it; take a later step") from None
    if (folder / "checkpoints").is_dir():
        repair(folder)
        return _latest_held(folder)
    if (folder / "config.json").is_file() and any((folder / name).exists() for name in HF_WEIGHTS):
        return Resolved("hf", folder)
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(folder.glob(pattern)):
            raise UserError(f"{folder} holds its weights as pickles ({pattern}), which can run code and are not read; "
                            "save the model as safetensors")
    raise UserError(f"{folder} is not a checkpoint: it has neither checkpoints/, {MANIFEST}, nor config.json with "
                    f"{' or '.join(HF_WEIGHTS)}")


def _latest_held(run: Path) -> Resolved:
    """A run folder's latest step, though a run may be writing there, and deleting what was the latest a moment ago."""
    for remaining in reversed(range(TRIES)):
        try:
            step = latest_step(run)
            if step is not None:
                return Resolved("run", step, Hold(step))
        except (FileNotFoundError, UserError):
            if not remaining:
                raise
    raise UserError(f"{run} is a run folder without a checkpoint")


def announce(root: Path, folder: str) -> None:
    """Writes down that `folder` is about to become the latest."""
    path = root / INTENT
    path.write_text(folder + "\n", encoding="utf-8")
    sync(path)


def publish(root: Path) -> None:
    """Moves `latest` to the announced folder, and forces it to the disk."""
    os.replace(root / INTENT, root / LATEST)
    sync(root)


def repair(run: Path) -> None:
    """Finishes in a run folder what a run did not live to finish: `tidy`, unless a run is writing there.

    Where the folder cannot be written nothing happens: readers then follow INTENT by themselves."""
    root = run / "checkpoints"
    if not (root / INTENT).exists() and not any(root.glob(OLD + "*")):
        return
    try:
        with open(run / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tidy(root)
    except OSError:
        pass


def tidy(root: Path) -> None:
    """Moves `latest` to the step that was about to be it, and deletes steps whose deletion had begun; for whoever holds
    the run's lock. What is half written stays for the next save, which begins by deleting it."""
    intent = root / INTENT
    if intent.is_file():
        word = intent.read_text(encoding="utf-8", errors="replace").strip()
        if named_step(word) is not None and (root / word / MANIFEST).is_file():
            publish(root)
        else:
            intent.unlink()  # its step was never whole
    for gone in root.glob(OLD + "*"):
        shutil.rmtree(gone, ignore_errors=True)


def later_steps(root: Path, step: int) -> list[Path]:
    """What stands under RUN/checkpoints with the name of a later step, whole or not."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (named_step(path.name) or 0) > step)


def go_back(root: Path, step: int) -> None:
    """Makes a step the latest: `latest` names it, and later ones are set aside as step-00000020.old (.old2, ..)."""
    later = later_steps(root, step)
    if (root / step_name(step) / MANIFEST).is_file():
        announce(root, step_name(step))
        publish(root)  # first: a crash among the renames leaves a run that goes on from this step
    for path in later:
        names = (path.with_name(f"{path.name}.old{number}") for number in ("", *range(2, 1000)))
        os.rename(path, next(name for name in names if not name.exists()))
    if later:
        sync(root)


def prune(root: Path, keep: int, latest: Path) -> None:
    """Deletes all but the newest `keep` step folders (0 keeps all), never `latest`. What somebody reads stays until a
    later save; so does what resists."""
    for folder in list(step_folders(root).values())[:-keep] if keep else []:
        if folder != latest:
            gone = root / f"{OLD}{folder.name}"
            try:
                _rename_unread(folder, gone)  # first out of sight: a half-deleted step must not look like one
            except OSError:
                continue
            shutil.rmtree(gone, ignore_errors=True)


def _rename_unread(folder: Path, target: Path) -> None:
    """Renames a step folder. Raises BlockingIOError where somebody holds it."""
    with ExitStack() as stack:
        try:
            manifest = stack.enter_context(open(folder / MANIFEST, "rb+"))  # NFS locks what can be written
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks, or a file that may not be written: nobody is known to read
        os.rename(folder, target)


def sync(path: Path) -> None:
    """Forces a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
