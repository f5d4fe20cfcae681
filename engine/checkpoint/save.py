"""Saving: every rank writes its slices into one fresh folder, rank 0 describes them, a rename makes it a checkpoint.

Whether a phase has succeeded is agreed by numbers that the ranks exchange, never by the presence of a file: a shared
file system may answer from its cache (NFS remembers for a minute that a name was not there).
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.dtypes import dtype_name
from engine.checkpoint.folders import INTENT, MANIFEST, OLD, announce, prune, publish, step_name, sync
from engine.checkpoint.manifest import OWN_KEYS, PLAIN, LogicalTensor, Manifest, Slice, dump_manifest
from engine.checkpoint.slices import Entry, Part, cover_fault, part_of
from engine.checkpoint.tensorfile import Block, write_tensors
from engine.errors import UserError

Agree = Callable[[Sequence[float]], Sequence[float]]
"""Sums of some numbers over all ranks; every rank calls it at the same points, with as many."""
Assets = Mapping[str, Path | bytes]
REASON = 1000
"""Bytes that the ranks are told of an error on another one."""
VISIBLE = 75.0
"""Seconds in which a file of one machine must be seen by the others; NFS looks again after at most 60."""


def save_checkpoint(root: Path, step: int, entries: Iterable[Entry], *, rank: int, world: int, agree: Agree,
                    meta: Mapping[str, Any], assets: Assets, keep: int = 0) -> Path:
    """Writes the checkpoint of a step under `root` (RUN/checkpoints) and moves `latest`; called by every rank.

    Of `entries` those of a primary member are written. `meta` (samples, config, world and whatever else resuming
    needs, plain JSON) and `assets` (the files of hf/) are taken from rank 0. All but the newest `keep` are deleted.
    Raises UserError on every rank when any rank fails; the temporary folder is then gone and `latest` untouched.
    """
    return save_parts(root, step, parts_of(entries), rank=rank, world=world, agree=agree, meta=meta, assets=assets,
                      keep=keep)


def parts_of(entries: Iterable[Entry]) -> list[Part]:
    """What this rank writes of its entries: copies are left to the rank whose member is primary."""
    return [part_of(entry) for entry in entries if entry.piece.member.primary]


def save_parts(root: Path, step: int, parts: Iterable[Part], *, rank: int, world: int, agree: Agree,
               meta: Mapping[str, Any], assets: Assets, keep: int = 0) -> Path:
    """`save_checkpoint` of parts that are read when they are written."""
    work = SaveWork(root, step, list(parts), rank=rank, world=world, meta=meta, assets=assets, keep=keep)
    for phase in work.phases:
        error: Exception | None = None
        try:
            phase()
        except Exception as raised:
            error = raised
        if agree([float(error is not None)])[0]:
            raise work.failed(error, agree) from error
    return work.final


def alone(numbers: Sequence[float]) -> Sequence[float]:
    """The sums over one rank."""
    return numbers


class SaveWork:
    """One rank's part in one save, as phases. A rank begins a phase when all ranks have ended the one before it."""

    def __init__(self, root: Path, step: int, parts: Sequence[Part], *, rank: int, world: int,
                 meta: Mapping[str, Any], assets: Assets, keep: int = 0,
                 before: Callable[[], None] = lambda: None) -> None:
        """`before` runs on rank 0 before the checkpoint gets its name: what a reader of it must find on the disk."""
        self.root, self.step, self.parts, self.rank, self.world = root, step, parts, rank, world
        self.meta, self.assets, self.keep, self.before = meta, assets, keep, before
        self.final = root / step_name(step)
        self.temporary = root / f".tmp-{self.final.name}"
        self.announced = False
        self.phases = (self.prepare, self.write, self.finish)

    def failed(self, error: Exception | None, agree: Agree) -> Exception:
        """What to raise on this rank when any rank has failed; every rank calls it when its own work has ended.
        Nothing of the save is left."""
        failure = self._failure(error, agree)
        if self.rank == 0:
            self.discard()
        return failure

    def discard(self) -> None:
        """Rank 0: deletes what has been written."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        if self.announced:
            (self.root / INTENT).unlink(missing_ok=True)

    def _failure(self, error: Exception | None, agree: Agree) -> Exception:
        """This rank's own error, or what the first rank that failed says of its own, byte by byte."""
        failed = agree([float(error is not None and rank == self.rank) for rank in range(self.world)])
        first = next(rank for rank, count in enumerate(failed) if count)
        said = _reason(error, self.final).encode()[:REASON] if error is not None and first == self.rank else b""
        told = agree([float(byte) for byte in said.ljust(REASON, b"\0")])
        if isinstance(error, (OSError, UserError)):
            return UserError(_reason(error, self.final))
        reason = bytes(int(byte) for byte in told).rstrip(b"\0").decode(errors="replace")
        return error if error is not None else UserError(f"rank {first}: {reason}")

    def prepare(self) -> None:
        """Rank 0 makes the fresh temporary folder; what crashed saves left behind goes first."""
        if self.rank > 0:
            return
        if self.final.exists():
            raise UserError(f"{self.final} exists already; a checkpoint is never written twice: delete it or use "
                            "another --out")
        self.root.mkdir(parents=True, exist_ok=True)
        for pattern in (".tmp-step-*", f"{OLD}*"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover)
        self.temporary.mkdir()

    def write(self) -> None:
        """Writes this rank's slices, and a report of them for rank 0."""
        if not _seen(lambda: os.scandir(self.temporary).close(), self.root):
            raise UserError(f"{self.temporary} of rank 0 is not there on rank {self.rank}; --out must be on a file "
                            "system that all machines share")
        name = f"rank-{self.rank:05d}.safetensors"
        blocks = [Block(part.key, part.dtype, part.extent, part.read) for part in self.parts]
        sums = write_tensors(self.temporary / name, blocks) if blocks else {}
        report = {"file": name, "bytes": (self.temporary / name).stat().st_size if blocks else 0, "slices": [
            {"name": part.name, "whole": part.shape, "dtype": dtype_name(part.dtype), "key": part.key,
             "offset": part.start, "shape": part.extent, "crc32": sums[part.key]} for part in self.parts]}
        self._report(self.rank).write_text(json.dumps(report), encoding="utf-8")

    def finish(self) -> None:
        """Rank 0: merges the reports, writes hf/ and the manifest, renames, moves `latest`, deletes the old."""
        if self.rank > 0:
            return
        clash = sorted(set(self.meta) & set(OWN_KEYS))
        if clash:
            raise UserError(f"the checkpoint's meta cannot have the keys {', '.join(clash)}")
        reports = [self._read_report(rank) for rank in range(self.world)]
        manifest = Manifest(self.step, self.meta, {r["file"]: r["bytes"] for r in reports if r["slices"]},
                            _write_assets(self.temporary / "hf", self.assets), _merge(reports))
        (self.temporary / MANIFEST).write_bytes(dump_manifest(manifest))
        sync(self.temporary / MANIFEST)
        for rank in range(self.world):
            self._report(rank).unlink()
        sync(self.temporary)
        self.before()
        self.announced = True
        announce(self.root, self.final.name)
        os.rename(self.temporary, self.final)
        try:
            sync(self.root)
            publish(self.root)
        except OSError:
            os.rename(self.final, self.temporary)  # so that all ranks agree that this save has failed
            raise
        prune(self.root, self.keep, self.final)

    def _report(self, rank: int) -> Path:
        return self.temporary / f"rank-{rank:05d}.json"

    def _read_report(self, rank: int) -> dict[str, Any]:
        """What a rank has written; that it has, is agreed."""
        found: list[str] = []
        if not _seen(lambda: found.append(self._report(rank).read_text(encoding="utf-8")), self.temporary):
            raise UserError(f"{self._report(rank)} of rank {rank} is not there on rank 0; --out must be on a file "
                            "system that all machines share")
        return dict(json.loads(found[0]))


def _seen(look: Callable[[], None], folder: Path) -> bool:
    """Whether what another machine has made can be opened here, in time."""
    deadline = time.monotonic() + VISIBLE
    while True:
        try:
            look()
            return True
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.2)
        if folder.is_dir():
            os.listdir(folder)  # has NFS ask its server again


def _reason(error: Exception, final: Path) -> str:
    """One line that names the path."""
    if isinstance(error, OSError):
        return f"{final} could not be saved: {error.filename or final}: {error.strerror or error}"
    return str(error)


def _merge(reports: Iterable[Mapping[str, Any]]) -> dict[str, LogicalTensor]:
    """The tensors of all ranks' reports; UserError where the ranks disagree or do not cover a tensor once."""
    found: dict[str, LogicalTensor] = {}
    for report in reports:
        for item in report["slices"]:
            piece = Slice(report["file"], item["key"], tuple(item["offset"]), tuple(item["shape"]), item["crc32"])
            tensor = LogicalTensor(tuple(item["whole"]), item["dtype"], (piece,))
            known = found.get(item["name"], tensor)
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(f"{item['name']} is {known.dtype} {list(known.shape)} on one rank and {tensor.dtype} "
                                f"{list(tensor.shape)} on another")
            slices = (piece,) if known is tensor else (*known.slices, piece)
            found[item["name"]] = LogicalTensor(known.shape, known.dtype, slices)
    for name, tensor in found.items():
        fault = cover_fault(tensor.shape, [(piece.offset, piece.shape) for piece in tensor.slices])
        if fault is not None:
            raise UserError(f"the ranks do not hold {name} once: {fault}")
    return dict(sorted(found.items()))


def _write_assets(folder: Path, assets: Assets) -> dict[str, tuple[int, int]]:
    """Writes the files of hf/; returns size and crc32 of each."""
    folder.mkdir()
    found = {}
    for name, content in sorted(assets.items()):
        if not PLAIN.fullmatch(name):
            raise UserError(f"{name!r} is not a plain file name for the checkpoint's hf folder")
        data = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(data)
        sync(folder / name)
        found[name] = (len(data), zlib.crc32(data))
    sync(folder)
    return found
