"""Saving and loading a checkpoint in GB/s beside raw copies of as many bytes; interleaved.

27.4 M parameters (the shape of train_step.py) in fp32 with both moments: 329 MB, one process. Saving includes the
checksums, the manifest, fsync and the renames; its peer is the same bytes from memory into a file, in writes of 64 MB,
with and without fsync. Loading includes the manifest, every checksum and the copy into the optimizer's buffers; its
peer is the same file read into memory. `copy` is shutil.copyfile of that file, reading and writing at once.

    python benchmarks/checkpoint_io.py [--rounds 5] [--folder DIR] [--patience S] [--save]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from common import Quiet, fill, keep, table
from train_step import SHAPE

WRITE = 64 << 20


class Subject:
    """An engine with all its state, a checkpoint of it, and the same bytes in one piece."""

    def __init__(self, folder: Path) -> None:
        import torch

        from engine.checkpoint import alone, open_checkpoint, save_checkpoint
        from engine.config import Layout, parse, to_dict
        from engine.mesh import AXES, Mesh
        from engine.model.shapes import logical_shapes
        from engine.train.engine import Engine

        self.folder, self.alone = folder, alone
        self.save_checkpoint, self.open_checkpoint = save_checkpoint, open_checkpoint
        config = parse([*SHAPE.split(), "--dtype", "fp32"])
        self.engine = Engine(config, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), torch.device("cpu"), torch.float32)
        fill(self.engine)
        for state in self.engine.optimizer.moments:  # zeros compress on some disks
            state.exp_avg.normal_()
            state.exp_avg_sq.uniform_()
        self.expected = logical_shapes(config.model)
        self.meta: dict[str, Any] = {"samples": 0, "config": to_dict(config), "world": vars(Layout())}
        self.bytes = sum(entry.tensor.nbytes for entry in self.engine.optimizer.entries())
        self.raw = memoryview(torch.cat([e.tensor.reshape(-1) for e in self.engine.optimizer.entries()]).numpy()
                              ).cast("B")
        self.target = bytearray(self.bytes)
        self.step = 0

    def save(self) -> None:
        """A whole checkpoint, as a run writes it."""
        self.step += 1
        self.save_checkpoint(self.folder / "checkpoints", self.step, self.engine.optimizer.entries(), rank=0, world=1,
                             agree=self.alone, meta=self.meta, assets={})

    def write(self, sync: bool) -> None:
        """The same bytes into one file."""
        with open(self.folder / "raw", "xb", buffering=0) as file:
            for at in range(0, self.bytes, WRITE):
                file.write(self.raw[at : at + WRITE])
            if sync:
                os.fsync(file.fileno())

    def load(self) -> None:
        """The newest checkpoint into the optimizer's buffers, every checksum verified."""
        step = self.folder / "checkpoints" / f"step-{self.step:08d}"
        self.open_checkpoint(step).load(self.engine.optimizer.entries(), expected=self.expected)

    def read(self) -> None:
        """The file's bytes into memory that is already there."""
        with open(self.folder / "raw", "rb", buffering=0) as file:
            view = memoryview(self.target)
            done = 0
            while done < self.bytes:
                done += file.readinto(view[done:])

    def copy(self, sync: bool) -> None:
        """The file copied by the system."""
        shutil.copyfile(self.folder / "raw", self.folder / "copy")
        if sync:
            with open(self.folder / "copy", "rb") as file:
                os.fsync(file.fileno())

    def turn(self, action: Callable[[], None], fresh: Iterable[str]) -> float:
        """Seconds of an action, after what it will write anew was removed and the disk settled."""
        self.tidy(fresh)
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def tidy(self, names: Iterable[str]) -> None:
        """Removes what a turn wrote and settles the disk, so that the next one pays for its own bytes alone."""
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.sync()


def contenders(subject: Subject) -> dict[str, tuple[Callable[[], None], tuple[str, ...]]]:
    """Name -> what is timed, and what is removed before it."""
    return {
        "triax save (fsync, crc32)": (subject.save, ("checkpoints",)),
        "raw write, fsync": (lambda: subject.write(True), ("raw",)),
        "raw write, no fsync": (lambda: subject.write(False), ("raw",)),
        "copy, fsync": (lambda: subject.copy(True), ("copy",)),
        "copy, no fsync": (lambda: subject.copy(False), ("copy",)),
        "triax load (crc32)": (subject.load, ()),
        "raw read": (subject.read, ()),
    }


PEERS = {"triax save (fsync, crc32)": ("copy, fsync", "raw write, fsync"),
         "triax load (crc32)": ("copy, no fsync", "raw read")}
"""What each of ours is compared with."""


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder if not given")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds spent on repeating turns with neighbours")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/checkpoint_io.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        subject, quiet = Subject(Path(name)), Quiet(args.patience)
        runners = contenders(subject)
        seconds: dict[str, list[float]] = {runner: [] for runner in runners}
        for number in range(args.rounds + 1):
            for runner, (action, fresh) in runners.items():
                if number:
                    seconds[runner].append(quiet.turn(partial(subject.turn, action, fresh)))
                else:  # a warm-up
                    subject.turn(action, fresh)
            if number:
                print(f"  round {number}/{args.rounds}: " + ", ".join(
                    f"{runner} {subject.bytes / taken[-1] / 1e9:.2f}" for runner, taken in seconds.items()), flush=True)
        report(subject.bytes, seconds, quiet, args.save)


def report(size: int, seconds: dict[str, list[float]], quiet: Quiet, save: bool) -> None:
    """Medians in GB/s, and the share of each peer's rate, taken round by round."""
    rows = [[f"{size / 1e6:.0f} MB", "GB/s", "min", "max", "share of its peers"]]
    results: dict[str, Any] = {}
    for name, taken in seconds.items():
        shares = {peer: statistics.median(b / a for a, b in zip(taken, seconds[peer], strict=True))
                  for peer in PEERS.get(name, ())}
        rows.append([name, f"{size / statistics.median(taken) / 1e9:.2f}", f"{size / max(taken) / 1e9:.2f}",
                     f"{size / min(taken) / 1e9:.2f}",
                     ", ".join(f"{share:.0%} of {peer}" for peer, share in shares.items()) or "-"])
        results[name] = {"gb_per_s": size / statistics.median(taken) / 1e9, "seconds": taken, "shares": shares}
    print(table(rows))
    print(quiet)
    if save:
        print(keep("checkpoint_io", {"bytes": size, "others": quiet.shares, "results": results}))


if __name__ == "__main__":
    main()
