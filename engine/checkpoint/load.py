"""Loading: a step folder opened with suspicion, its slices checked as they are read, any layout served by slicing."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.dtypes import CODES, DTYPES
from engine.checkpoint.folders import named_step
from engine.checkpoint.manifest import LogicalTensor, Manifest, Slice, load_manifest
from engine.checkpoint.slices import KINDS, Entry, Shape, cover_fault, overlap, window
from engine.checkpoint.source import match_dtypes, match_names
from engine.checkpoint.stored_config import stored_config
from engine.checkpoint.tensorfile import TensorFile
from engine.config import RunConfig
from engine.errors import UserError, shown
from engine.signature import refuse_pointer

MOST = 1 << 48
"""Steps and samples beyond any run."""
READERS = 2
"""Threads that read slices and sum them."""


@dataclass(frozen=True)
class _Cut:
    """What a wanted rectangle takes from one slice."""

    piece: Slice
    start: Shape
    extent: Shape


class Checkpoint:
    """An opened step folder; its structure has been checked, its values are checked when they are read."""

    def __init__(self, folder: Path, manifest: Manifest, files: Mapping[str, TensorFile]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files = files
        self._sound: set[tuple[str, str]] = set()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def samples(self) -> int:
        """Training samples consumed."""
        return int(self.manifest.meta["samples"])

    @property
    def optimizer_steps(self) -> int:
        """Updates of the optimizer. Raises UserError where the checkpoint holds weights alone."""
        if "optimizer_steps" not in self.manifest.meta:
            raise UserError(f"{shown(self.folder)} holds no optimizer; use --load, which takes the weights alone")
        return int(self.manifest.meta["optimizer_steps"])

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, as `engine.config.to_dict` made it."""
        return dict(self.manifest.meta["config"])

    def run_config(self) -> RunConfig:
        """The run's config. Raises UserError for what a newer Triax has put there, and for a model that cannot be."""
        return stored_config(self.config, self.folder, self.manifest.writer)

    @property
    def meta(self) -> Mapping[str, Any]:
        """All that the run saved beside its tensors: samples, config, world and more."""
        return self.manifest.meta

    @property
    def tensors(self) -> Mapping[str, LogicalTensor]:
        """Kind and logical name -> shape, dtype, slices."""
        return self.manifest.tensors

    @property
    def assets(self) -> Path:
        """The folder with the HF config, the tokenizer and the chat template."""
        return self.folder / "hf"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors it holds: the model, and what the optimizer had."""
        held = {name.partition("/")[0] for name in self.tensors}
        return tuple(kind for kind in KINDS if kind in held)

    def source(self, kind: str = "model") -> CheckpointSource:
        """The tensors of one kind under their logical names."""
        return CheckpointSource(self, kind)

    def load(self, entries: Iterable[Entry], *, expected: Mapping[str, Shape], cast: bool = False,
             kinds: Sequence[str] | None = None) -> None:
        """Fills every entry of the given kinds in place, whatever layout wrote them. Where it raises, some hold values.

        `expected`: all logical names and shapes of the model, also those of other ranks; `kinds`: those to read, all
        that the entries have if not given. Raises UserError naming every tensor that is missing, extra, of another
        shape or (unless `cast`) dtype, or the slice whose bytes do not match their checksum.
        """
        wanted = [entry for entry in entries if kinds is None or entry.kind in kinds]
        for kind in sorted({entry.kind for entry in wanted} | set(self.kinds if kinds is None else kinds)):
            if kind not in self.kinds:
                raise UserError(f"{self.folder} holds no {kind} tensors, which this run has; use the --dtype it was "
                                "saved with, or --load, which takes the weights alone")
            match_names(f"{self.folder} ({kind})", self.source(kind).shapes, expected)
        if not cast:
            match_dtypes(str(self.folder), ((entry.name, DTYPES[self.tensors[entry.name].dtype], entry.tensor.dtype)
                                            for entry in wanted))
        plan = [(entry, self._cuts(entry.name, entry.piece.start, entry.piece.extent)) for entry in wanted]
        plan.sort(key=lambda item: self._position(item[1][0].piece))
        pool = ThreadPoolExecutor(READERS)
        try:
            checks: dict[tuple[str, str], Future[None]] = {}
            copies: list[tuple[torch.Tensor, _Cut]] = []
            for entry, cuts in plan:
                for cut in cuts:
                    mark = (cut.piece.file, cut.piece.key)
                    target = window(entry.tensor.detach(), cut.start, cut.extent, entry.piece.start)
                    stored = DTYPES[self.tensors[entry.name].dtype]
                    if mark not in checks and stored == target.dtype and _is_whole(target, cut):
                        checks[mark] = pool.submit(self._fill, target, cut.piece)
                        continue
                    if mark not in checks:
                        checks[mark] = pool.submit(self._verify, cut.piece)
                    copies.append((target, cut))
            for target, cut in copies:
                checks[cut.piece.file, cut.piece.key].result()
                _copy(target, self._values(cut))
            for check in checks.values():
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, name: str, start: Shape, extent: Shape) -> torch.Tensor:
        """The rectangle of tensor `name` (with its kind); a view of the file where one slice holds it all."""
        cuts = self._cuts(name, start, extent)
        for cut in cuts:
            self._verify(cut.piece)
        if len(cuts) == 1 and cuts[0].extent == tuple(extent):
            return self._values(cuts[0])
        whole = torch.empty(extent, dtype=DTYPES[self.tensors[name].dtype])
        for cut in cuts:
            window(whole, cut.start, cut.extent, start).copy_(self._values(cut))
        return whole

    def _cuts(self, name: str, start: Shape, extent: Shape) -> list[_Cut]:
        cuts = []
        for piece in self.tensors[name].slices:
            shared = overlap(start, extent, piece.offset, piece.shape)
            if shared is not None:
                cuts.append(_Cut(piece, *shared))
        return cuts

    def _values(self, cut: _Cut) -> torch.Tensor:
        return window(self._files[cut.piece.file].tensor(cut.piece.key), cut.start, cut.extent, cut.piece.offset)

    def _fill(self, target: torch.Tensor, piece: Slice) -> None:
        """Reads a slice into its place and checks its bytes there."""
        memory = target.reshape(-1).view(torch.uint8).numpy().data
        self._compare(piece, self._files[piece.file].read_into(piece.key, memory))

    def _position(self, piece: Slice) -> tuple[str, int]:
        """Where a slice stands on disk: reading in this order is reading ahead."""
        return piece.file, self._files[piece.file].tensors[piece.key].begin

    def _verify(self, piece: Slice) -> None:
        """Checks a slice's bytes, once."""
        mark = (piece.file, piece.key)
        if mark in self._sound:
            return
        self._compare(piece, zlib.crc32(self._files[piece.file].raw(piece.key)))

    def _compare(self, piece: Slice, found: int) -> None:
        """Raises UserError unless a slice's checksum is the one that was written."""
        if found != piece.crc32:
            raise UserError(f"{self.folder / piece.file}: the bytes of {piece.key} do not match their checksum (crc32 "
                            f"{found:08x}, written {piece.crc32:08x}); the file is damaged: take another step")
        self._sound.add((piece.file, piece.key))


def _is_whole(target: torch.Tensor, cut: _Cut) -> bool:
    """Whether a target in host memory takes all of a slice, and lies in one piece."""
    return target.device.type == "cpu" and target.is_contiguous() and tuple(cut.extent) == tuple(cut.piece.shape)


def _copy(target: torch.Tensor, values: torch.Tensor) -> None:
    """target = values, by one thread where both are in host memory and alike.

    torch's own copy starts a team of OpenMP threads that spin while they wait: beside the checksums' threads, on as
    many cores, loading was six times slower.
    """
    if target.device.type == "cpu" and target.dtype == values.dtype:
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[target.element_size()]  # numpy has no bfloat16
        np.copyto(target.view(word).numpy(), values.view(word).numpy())
    else:
        target.copy_(values)


class CheckpointSource:
    """A checkpoint's tensors of one kind, as a TensorSource."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        self.place = str(checkpoint.folder)
        self._checkpoint = checkpoint
        self._kind = kind
        self.shapes: Mapping[str, Shape] = {name.partition("/")[2]: tensor.shape for name, tensor
                                            in checkpoint.tensors.items() if name.partition("/")[0] == kind}

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        return DTYPES[self._checkpoint.tensors[f"{self._kind}/{name}"].dtype]

    def read(self, name: str, start: Shape, extent: Shape) -> torch.Tensor:
        """The rectangle [start, start + extent) of a tensor, its checksums verified."""
        return self._checkpoint.read(f"{self._kind}/{name}", start, extent)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Opens a step folder and checks its structure: manifest, files and their sizes, headers, coverage, hf files.

    Raises UserError for the first fault, by name.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    _check_meta(folder, manifest)
    for name, size in manifest.files.items():
        _check_size(folder / name, size)
    for stray in sorted(folder.glob("*.safetensors")):
        if stray.name not in manifest.files:
            raise UserError(f"{stray} is not in the manifest: the folder mixes two checkpoints; move it away")
    files = {name: TensorFile(folder / name) for name in manifest.files}
    _check_slices(folder, manifest, files)
    for name, (size, crc) in manifest.assets.items():
        _check_size(folder / "hf" / name, size)
        if zlib.crc32((folder / "hf" / name).read_bytes()) != crc:
            raise UserError(f"{folder / 'hf' / name} does not match its checksum: it is damaged or was edited")
    return Checkpoint(folder, manifest, files)


def _check_meta(folder: Path, manifest: Manifest) -> None:
    """The counts and tables beside the tensors are what they must be."""
    for key in ("config", "world"):
        if not isinstance(manifest.meta.get(key), dict):
            raise UserError(f"{shown(folder)}: the manifest has no {key}")
    counts = {"step": manifest.step, "samples": manifest.meta.get("samples"),
              "optimizer_steps": manifest.meta.get("optimizer_steps", 0)}
    for key, value in counts.items():
        if value is None:
            raise UserError(f"{shown(folder)}: the manifest has no {key}")
        if type(value) is not int or not 0 <= value < MOST:
            raise UserError(f"{shown(folder)}: {key} in the manifest is {shown(value, 40)}, not a number below {MOST}")
    if named_step(folder.name) not in (None, manifest.step):
        raise UserError(f"{shown(folder)} holds step {manifest.step}: the folder was renamed, or the manifest is "
                        "another's; give the folder its own name again")


def _check_size(path: Path, size: int) -> None:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is missing, or is not a plain file")
    found = path.stat().st_size
    if found != size:
        refuse_pointer(path)
        what = "cut short" if found < size else "damaged, or was changed"
        raise UserError(f"{path} has {found} bytes, and the manifest says {size}; it is {what}")


def _check_slices(folder: Path, manifest: Manifest, files: Mapping[str, TensorFile]) -> None:
    """The files' headers hold exactly the manifest's slices, and these cover each tensor once."""
    unused = {(file, key) for file, opened in files.items() for key in opened.tensors}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.slices:
            place = (piece.file, piece.key)
            if place not in unused:
                raise UserError(f"{folder / piece.file} does not hold {piece.key}, or the manifest names it twice")
            unused.remove(place)
            stored = files[piece.file].tensors[piece.key]
            if (stored.code, stored.shape) != (CODES[tensor.dtype], piece.shape):
                raise UserError(f"{folder / piece.file}: {piece.key} is {stored.code} {list(stored.shape)}, and the "
                                f"manifest says {CODES[tensor.dtype]} {list(piece.shape)}")
        fault = cover_fault(tensor.shape, [(piece.offset, piece.shape) for piece in tensor.slices])
        if fault is not None:
            raise UserError(f"{folder}: {name} is not whole: {fault}")
    if unused:
        file, key = min(unused)
        raise UserError(f"{folder / file} holds {key}, which the manifest does not name")
