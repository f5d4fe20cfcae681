"""Conversion both ways, tensor by tensor: what is held at any moment is one tensor and its source's pages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.dtypes import DTYPES, dtype_name
from engine.checkpoint.folders import HF_WEIGHTS, Resolved, resolve, sync
from engine.checkpoint.load import open_checkpoint
from engine.checkpoint.save import alone, save_parts
from engine.checkpoint.slices import Part
from engine.checkpoint.source import TensorSource, all_finite, compress, match_names
from engine.checkpoint.strict_json import parse_object
from engine.checkpoint.tensorfile import Block, write_tensors
from engine.config import ModelConfig, RunConfig, to_dict, to_yaml
from engine.errors import UserError, shown
from engine.hf.assets import dump
from engine.hf.config import FAMILIES, HF_DTYPES, config_from_hf, config_to_hf
from engine.hf.files import plain_file
from engine.hf.folder import open_hf
from engine.hf.serving import CONFIG, GENERATION, TokenIds, generation_config, read_origin
from engine.hf.serving_tokenizer import serving_tokenizer
from engine.model.shapes import logical_shapes
from engine.tokenizer import is_tokenizer, load_tokenizer, tokenizer_files
from engine.tokenizer.files import JSON
from engine.tokenizer.json_file import read_tokenizer_json

Progress = Callable[[str], None]
Assets = dict[str, Path | bytes]


@dataclass(frozen=True)
class Model:
    """Weights to be converted: `kind` "hf" or "engine", the network, its tensors, the files beside them and the folder
    they lie in; `nonfinite` collects the names of tensors that were read and hold NaN or infinity."""

    kind: str
    config: ModelConfig
    source: TensorSource
    assets: Assets
    folder: Path
    nonfinite: set[str] = field(default_factory=set)
    found: Resolved | None = None
    """Keeps the run that wrote the checkpoint from deleting it."""

    def dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        """The format a tensor is written in."""
        return self.source.dtype(name) if wanted is None else wanted

    def read(self, name: str, wanted: torch.dtype | None) -> torch.Tensor:
        """A whole logical tensor in the format it is written in; UserError where fp16 cannot hold its values."""
        shape = self.source.shapes[name]
        values = self.source.read(name, (0,) * len(shape), shape)
        cast = values.to(self.dtype(name, wanted))
        if not all_finite(values):
            self.nonfinite.add(name)
        elif not all_finite(cast):
            wider = "bf16" if cast.dtype == torch.float16 else "fp64"
            most, word = float(values.abs().max()), dtype_name(cast.dtype)
            raise UserError(f"{name} has values up to {most:.3g}, beyond {word}; use --dtype {wider}")
        return cast


def open_model(path: Path | str) -> Model:
    """The weights of a run folder, a step folder or a Hugging Face folder; UserError where they do not fit."""
    found = resolve(path)
    if found.kind == "hf":
        source = open_hf(found.folder)
        return Model("hf", source.config, source, _hf_assets(found.folder, source.config), found.folder)
    checkpoint = open_checkpoint(found.folder)
    config = checkpoint.run_config().model
    # A model whose head is tied has none; a checkpoint that holds one contradicts its config and is refused here.
    match_names(str(found.folder), checkpoint.source().shapes, logical_shapes(config))
    assets: Assets = {name: checkpoint.assets / name for name in checkpoint.manifest.assets}
    return Model("engine", config, checkpoint.source(), assets, checkpoint.assets, found=found)


def _hf_assets(folder: Path, config: ModelConfig) -> Assets:
    """What a checkpoint keeps of an HF folder: the tokenizer's and the generation config's bytes, a config of ours."""
    origin = read_origin(folder)
    found: Assets = {CONFIG: dump({**config_to_hf(config, origin.ids), **origin.config}),
                     GENERATION: dump(generation_config(origin.ids, origin))}
    for name in (*tokenizer_files(folder), GENERATION):
        if (folder / name).is_file():
            found[name] = plain_file(folder, name)
    return found


def convert(load: Path, save: Path, *, to: str | None, dtype: str | None, shard_bytes: int, say: Progress,
            force: bool = False) -> str:
    """Writes `load` as `save`, a fresh folder in the format `to` ("hf", "engine"; None: the other one); returns `to`.

    `dtype`: the weights' format, None keeps it. Raises UserError before anything is written where the input does not
    fit, the output is in the way, or an export's tokenizer would give other ids (unless `force`); a failure leaves no
    output.
    """
    check_output(load, save)
    model = open_model(load)
    to = to or ("engine" if model.kind == "hf" else "hf")
    wanted = DTYPES[dtype] if dtype else None
    _check_tokenizer(model, force, say)
    if to == "hf":
        tokenizer = serving_tokenizer(model.assets, model.folder, force=force, say=say)
        model = replace(model, assets={**model.assets, **tokenizer})
    with fresh_folder(save) as folder:
        if to == "hf":
            write_hf(model, folder, wanted, shard_bytes, say)
        else:
            write_run(model, folder, wanted, say)
    if model.nonfinite:
        names = compress(sorted(model.nonfinite))
        say(f"warning: {shown(model.source.place)} holds NaN or infinity in {names}; it was converted as it is, and "
            "computes nothing")
    return to


def _check_tokenizer(model: Model, force: bool, say: Progress) -> None:
    """UserError where the folder has a tokenizer that cannot be loaded; with `force` that is said. Where the package
    `tokenizers` is missing, its file is looked at as far as it can be without."""
    if not is_tokenizer(model.assets):
        return
    try:
        if JSON in model.assets and importlib.util.find_spec("tokenizers") is None:
            read_tokenizer_json(model.folder / JSON)
        else:
            load_tokenizer(str(model.folder))
    except UserError as fault:
        if not force:
            raise UserError(f"the tokenizer cannot be used: {fault}; mend or delete it, or say --force to convert it "
                            "as it is") from None
        say(f"warning: the tokenizer cannot be used, and is converted as it is: {fault}")


def check_output(load: Path, save: Path) -> None:
    """UserError where the output would touch the input, or what stands there already."""
    source, target = load.resolve(), save.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"--save {save} and --load {load} lie in each other; give another --save")
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UserError(f"--save {save} is there already and not empty; delete it or give another --save")


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end, or goes when anything fails."""
    target = target.resolve()
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        sync(temporary)
        os.rename(temporary, target)  # over an empty folder too
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.filename or target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_hf(model: Model, folder: Path, dtype: torch.dtype | None, shard_bytes: int, say: Progress) -> None:
    """Writes a serving folder: weights in files of at most `shard_bytes`, their index, and the files beside them."""
    for name, content in hf_files(model, dtype).items():
        (folder / name).write_bytes(content)
        sync(folder / name)
    shards = plan_shards(_hf_blocks(model, dtype), shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [HF_WEIGHTS[0]] if len(shards) == 1 else names
    total, done = sum(block.bytes for shard in shards for block in shard), 0
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, {"format": "pt"})
        done += sum(block.bytes for block in shard)
        say(f"wrote {name}: {len(shard)} tensors, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    if len(shards) > 1:
        table = {block.key: name for name, shard in zip(names, shards, strict=True) for block in shard}
        (folder / HF_WEIGHTS[1]).write_bytes(dump({"metadata": {"total_size": total}, "weight_map": table}))
        sync(folder / HF_WEIGHTS[1])


def hf_files(model: Model, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The files beside the weights; config.json names the format that most of the weights have.

    UserError where the config.json kept in a checkpoint is not that of its model.
    """
    files = {name: content if isinstance(content, bytes) else content.read_bytes()
             for name, content in model.assets.items()}
    word = HF_DTYPES[main_dtype(model, dtype)]
    network = config_to_hf(model.config, TokenIds())
    place = f"{model.source.place}: config.json"
    config = parse_object(files["config.json"], place) if "config.json" in files else network
    if not same_network(config_from_hf(config, place), model.config):
        raise UserError(f"{place} in its hf folder describes another network than the checkpoint's config")
    return {**files, "config.json": dump({**config, "dtype": word, "torch_dtype": word})}


def same_network(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs compute the same; the preset's name and what a family does not use may differ."""
    return config_to_hf(one, TokenIds()) == config_to_hf(other, TokenIds())


def main_dtype(model: Model, dtype: torch.dtype | None) -> str:
    """Our word for the format of most of the values written."""
    weight: dict[str, int] = {}
    for name, shape in model.source.shapes.items():
        word = dtype_name(model.dtype(name, dtype))
        weight[word] = weight.get(word, 0) + torch.Size(shape).numel()
    return max(weight, key=lambda word: weight[word])


def _hf_blocks(model: Model, dtype: torch.dtype | None) -> list[Block]:
    """The tensors of the HF folder, each read when it is written."""
    shapes = logical_shapes(model.config)

    def block(name: str, parts: Sequence[str], transpose: bool, shape: tuple[int, ...]) -> Block:
        def read() -> torch.Tensor:
            tensors = [model.read(part, dtype) for part in parts]
            stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            return stacked.t() if transpose else stacked

        return Block(name, model.dtype(parts[0], dtype), shape, read)

    held = FAMILIES[model.config.family].tensors(model.config)
    return [block(name, item.parts, item.transpose, item.shape(shapes)) for name, item in held.items()]


def plan_shards(blocks: Sequence[Block], shard_bytes: int) -> list[list[Block]]:
    """The blocks in order, cut into files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[Block]] = []
    room = 0
    for block in blocks:
        if not shards or block.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(block)
        room -= block.bytes
    return shards


def write_run(model: Model, folder: Path, dtype: torch.dtype | None, say: Progress) -> None:
    """Writes a run folder with the weights as step 0, which --load takes like any other."""
    run = RunConfig(model=model.config)
    parts = [_part(model, name, shape, dtype) for name, shape in model.source.shapes.items()]
    assets = {**model.assets, **{name: data for name, data in hf_files(model, dtype).items() if name == "config.json"}}
    meta = {"samples": 0, "config": to_dict(run), "world": {"pp": 1, "dp": 1, "cp": 1, "tp": 1}}
    step = save_parts(folder / "checkpoints", 0, parts, rank=0, world=1, agree=alone, meta=meta, assets=assets)
    (folder / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
    size = sum(file.stat().st_size for file in step.glob("*.safetensors"))
    say(f"wrote checkpoints/{step.name}: {len(parts)} tensors, {size / 1e6:,.1f} MB")


def _part(model: Model, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Part:
    return Part(f"model/{name}", shape, (0,) * len(shape), shape, model.dtype(name, dtype),
                lambda: model.read(name, dtype))


def differences(before: TensorSource, after: TensorSource, dtype: str | None,
                names: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """For each logical tensor whether `after` holds the bits of `before` (after the cast to `dtype`)."""
    for name, shape in names.items():
        start = (0,) * len(shape)
        want = before.read(name, start, shape).to(DTYPES[dtype] if dtype else before.dtype(name))
        have = after.read(name, start, shape)
        same = want.dtype == have.dtype and torch.equal(_bits(want), _bits(have))
        yield name, same


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals itself, and 0 differs from -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
