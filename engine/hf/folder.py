"""The weights of a Hugging Face folder under logical names; every file is read with suspicion, and only safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from engine.checkpoint.dtypes import code_dtype
from engine.checkpoint.folders import HF_WEIGHTS
from engine.checkpoint.slices import Shape, window
from engine.checkpoint.source import compress, match_names
from engine.checkpoint.strict_json import read_object
from engine.checkpoint.tensorfile import TensorFile
from engine.config import ModelConfig
from engine.errors import UserError
from engine.hf.config import FAMILIES, read_config
from engine.hf.family import Family, spots
from engine.hf.files import plain_file
from engine.model.shapes import logical_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HFSource:
    """A Hugging Face folder as a TensorSource: logical names, our orientation, one logical tensor at a time."""

    def __init__(self, folder: Path, config: ModelConfig, files: Mapping[str, tuple[TensorFile, str]]) -> None:
        """`files`: canonical HF name -> the file and the name in it. UserError unless they are exactly the model's."""
        self.place = str(folder)
        self.config = config
        self.shapes: Mapping[str, Shape] = logical_shapes(config)
        self._files = files
        family = FAMILIES[config.family]
        self._spots = spots(family, config)
        wanted = {name: held.shape(self.shapes) for name, held in family.tensors(config).items()}
        match_names(self.place, {name: file.tensors[key].shape for name, (file, key) in files.items()}, wanted)
        for name in self.shapes:
            self.dtype(name)  # quantised weights are refused now, not half way

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        file, key = self._files[self._spots[name].name]
        return code_dtype(file.tensors[key].code, f"{file.path}: {key}")

    def read(self, name: str, start: Shape, extent: Shape) -> torch.Tensor:
        """The rectangle [start, start + extent) of a logical tensor, a view of the file."""
        spot = self._spots[name]
        file, key = self._files[spot.name]
        stored = file.tensor(key)
        stacked = stored.t() if spot.transpose else stored
        return window(stacked, (start[0] + spot.row, *start[1:]), extent, (0,) * len(extent))


def open_hf(folder: Path | str) -> HFSource:
    """Opens a Hugging Face folder: its config, and its safetensors files with all their headers checked.

    Raises UserError for a network we do not compute, for hostile files, and for weights that do not fit the config,
    a head in a folder that says it is tied included (a copy of the embedding is let pass).
    """
    folder = Path(folder)
    config = read_config(folder)
    family = FAMILIES[config.family]
    return HFSource(folder, config, _tied(folder, config, family, _tensors(folder, family)))


def _tensors(folder: Path, family: Family) -> dict[str, tuple[TensorFile, str]]:
    """Canonical name -> the file that holds it, and its name there."""
    found: dict[str, tuple[TensorFile, str]] = {}
    for path, listed in _shards(folder).items():
        file = TensorFile(path)
        if listed is not None and set(file.tensors) != listed:
            odd = compress(sorted(set(file.tensors) ^ listed))
            raise UserError(f"{path} and {HF_WEIGHTS[1]} do not agree on {odd}")
        for key in file.tensors:
            name = family.canonical(key)
            if name in found:
                raise UserError(f"{folder}: {name} stands in {found[name][0].path.name} and again in {path.name}")
            if not family.ignored.fullmatch(name):
                found[name] = (file, key)
    return found


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold the weights, and the names the index lists for each (None without an index)."""
    single, index = (folder / name for name in HF_WEIGHTS)
    if single.exists() and index.exists():
        raise UserError(f"{folder} holds both {single.name} and {index.name}; move away the one that does not "
                        "belong to the model")
    if not index.exists():
        return {plain_file(folder, single.name): None}
    table = read_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index} has no weight_map of tensor names to file names")
    listed: dict[str, set[str]] = {}
    for tensor, name in table.items():
        listed.setdefault(name, set()).add(tensor)
    return {plain_file(folder, name): tensors for name, tensors in sorted(listed.items())}


def _tied(folder: Path, config: ModelConfig, family: Family,
          found: dict[str, tuple[TensorFile, str]]) -> dict[str, tuple[TensorFile, str]]:
    """Drops the head of a tied model where it repeats the embedding; UserError where it differs from it."""
    if not config.tied or HEAD not in found:
        return found
    embedding = spots(family, config)[EMBEDDING].name
    file, key = found[HEAD]
    if embedding in found and torch.equal(file.tensor(key), found[embedding][0].tensor(found[embedding][1])):
        return {name: place for name, place in found.items() if name != HEAD}
    raise UserError(f"{folder}: config.json says tie_word_embeddings, but {file.path.name} holds a {HEAD} of its "
                    "own; set the flag to false, or remove the tensor")
