"""Saving: every rank writes its slices into one fresh folder, rank 0 describes them, a rename makes it a checkpoint.

Nothing is agreed by messages: the folder's name follows from the step, and the files in it say who has succeeded.
The only communication is the barrier, which every rank passes the same number of times whatever happens to it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.dtypes import dtype_name
from engine.checkpoint.folders import INTENT, MANIFEST, announce, prune, publish, step_name, sync
from engine.checkpoint.manifest import OWN_KEYS, PLAIN, LogicalTensor, Manifest, Slice, dump_manifest
from engine.checkpoint.slices import Entry, Part, cover_fault, part_of
from engine.checkpoint.tensorfile import Block, write_tensors
from engine.errors import UserError

Barrier = Callable[[], None]
Assets = Mapping[str, Path | bytes]


def save_checkpoint(root: Path, step: int, entries: Iterable[Entry], *, rank: int, world: int, barrier: Barrier,
                    meta: Mapping[str, Any], assets: Assets, keep: int = 0) -> Path:
    """Writes the checkpoint of a step under `root` (RUN/checkpoints) and moves `latest`; called by every rank.

    Of `entries` those of a primary member are written. `meta` (samples, config, world and whatever else resuming
    needs, plain JSON) and `assets` (the files of hf/) are taken from rank 0. All but the newest `keep` are deleted.
    Raises UserError on every rank when any rank fails; the temporary folder is then gone and `latest` untouched.
    """
    parts = [part_of(entry) for entry in entries if entry.piece.member.primary]
    return save_parts(root, step, parts, rank=rank, world=world, barrier=barrier, meta=meta, assets=assets, keep=keep)


def save_parts(root: Path, step: int, parts: Iterable[Part], *, rank: int, world: int, barrier: Barrier,
               meta: Mapping[str, Any], assets: Assets, keep: int = 0) -> Path:
    """`save_checkpoint` of parts that are read when they are written."""
    save = _Save(root, step, rank, world)
    if save.final.exists():
        raise UserError(f"{save.final} exists already; a checkpoint is never written twice: delete it or use "
                        "another --out")
    save.attempt(save.prepare)
    barrier()
    save.attempt(lambda: save.write(list(parts)))
    barrier()
    if rank == 0:
        save.attempt(lambda: save.finish(meta, assets, keep))
    barrier()
    if (save.final / MANIFEST).is_file() and save.error is None:
        return save.final
    failure = save.failure()
    barrier()  # everyone has read why before it goes
    if rank == 0:
        shutil.rmtree(save.temporary, ignore_errors=True)
        (root / INTENT).unlink(missing_ok=True)
    raise failure from save.error


class _Save:
    """One rank's part in one save."""

    def __init__(self, root: Path, step: int, rank: int, world: int) -> None:
        self.root, self.step, self.rank, self.world = root, step, rank, world
        self.final = root / step_name(step)
        self.temporary = root / f".tmp-{self.final.name}"
        self.error: Exception | None = None

    def attempt(self, phase: Callable[[], None]) -> None:
        """Runs a phase unless one has failed; a failure is kept and written down for the others."""
        if self.error is not None:
            return
        try:
            phase()
        except Exception as error:
            self.error = error
            try:
                (self.temporary / f"failed-{self.rank:05d}").write_text(_reason(error, self.final), encoding="utf-8")
            except OSError:
                pass  # a disk without room for this line; the missing report says enough

    def failure(self) -> Exception:
        """What to raise: this rank's own error, or that of the first rank that wrote one down."""
        if self.error is not None:
            own = isinstance(self.error, (OSError, UserError))
            return UserError(_reason(self.error, self.final)) if own else self.error
        for marker in sorted(self.temporary.glob("failed-*")):
            return UserError(f"rank {int(marker.name[7:])}: {marker.read_text(encoding='utf-8')}")
        return UserError(f"{self.final} was not saved: rank 0 failed")

    def prepare(self) -> None:
        """Rank 0 makes the fresh temporary folder; what crashed saves left behind goes first."""
        if self.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            for pattern in (".tmp-step-*", ".old-step-*"):
                for leftover in self.root.glob(pattern):
                    shutil.rmtree(leftover)
            self.temporary.mkdir()

    def write(self, parts: list[Part]) -> None:
        """Writes this rank's slices, then its report: the report's presence is the proof that the slices are whole."""
        if not self.temporary.is_dir():
            raise UserError(f"{self.temporary} is not there on rank {self.rank}: rank 0 could not make it, or --out is "
                            "not on a file system that all machines share")
        name = f"rank-{self.rank:05d}.safetensors"
        blocks = [Block(part.key, part.dtype, part.extent, part.read) for part in parts]
        sums = write_tensors(self.temporary / name, blocks) if blocks else {}
        report = {"file": name, "bytes": (self.temporary / name).stat().st_size if blocks else 0, "slices": [
            {"name": part.name, "whole": part.shape, "dtype": dtype_name(part.dtype), "key": part.key,
             "offset": part.start, "shape": part.extent, "crc32": sums[part.key]} for part in parts]}
        self._report(self.rank).write_text(json.dumps(report), encoding="utf-8")

    def finish(self, meta: Mapping[str, Any], assets: Assets, keep: int) -> None:
        """Rank 0: merges the reports, writes hf/ and the manifest, renames, moves `latest`, deletes the old."""
        missing = [rank for rank in range(self.world) if not self._report(rank).is_file()]
        if missing:
            said = sorted(self.temporary.glob("failed-*"))
            reason = f": {said[0].read_text(encoding='utf-8')}" if said else ""
            raise UserError(f"{self.final} was not saved: rank {missing[0]} did not write its part{reason}")
        clash = sorted(set(meta) & set(OWN_KEYS))
        if clash:
            raise UserError(f"the checkpoint's meta cannot have the keys {', '.join(clash)}")
        reports = [json.loads(self._report(rank).read_text(encoding="utf-8")) for rank in range(self.world)]
        manifest = Manifest(self.step, meta, {r["file"]: r["bytes"] for r in reports if r["slices"]},
                            _write_assets(self.temporary / "hf", assets), _merge(reports))
        (self.temporary / MANIFEST).write_bytes(dump_manifest(manifest))
        sync(self.temporary / MANIFEST)
        for rank in range(self.world):
            self._report(rank).unlink()
        sync(self.temporary)
        announce(self.root, self.final.name)
        os.rename(self.temporary, self.final)
        try:
            sync(self.root)
            publish(self.root)
        except OSError:
            os.rename(self.final, self.temporary)  # so that all ranks agree that this save has failed
            raise
        prune(self.root, keep, self.final)

    def _report(self, rank: int) -> Path:
        return self.temporary / f"rank-{rank:05d}.json"


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
