"""From a command line to a job that is known to be sound, before any process group exists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.checkpoint import Resolved, latest_step, open_checkpoint
from engine.config import Layout, ModelConfig, RunConfig, check
from engine.config.flags import Values, build
from engine.config.idle import refuse_idle
from engine.config.presets import preset_fault
from engine.config.recompute import AUTO
from engine.data.fingerprint import Fingerprint, copy_notes
from engine.errors import UserError, shown
from engine.hf import Origin, TokenIds, config_to_hf, read_origin, token_ids
from engine.kernels.dispatch import Kernels, KernelsUnavailable, choose
from engine.plan import Capacity, Plan, capacity_of, estimate, least_recompute, require_memory
from engine.tokenizer import Tokenizer, is_tokenizer, load_tokenizer, tokenizer_files
from engine.tokenizer.extend import why_no_extension
from engine.train.engine import DTYPES
from engine.train.launch import choose_device
from engine.train.lock import check_lock
from engine.train.place import Place
from engine.train.request import Request, Switches
from engine.train.start import Start, find_start, same_data


@dataclass(frozen=True)
class Job:
    """A checked run: config, layout, device, where its weights come from. The plan's config is the same with
    `--recompute auto` decided: with that the engine is built, and the job's own is what is stored."""

    config: RunConfig
    layout: Layout
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    plan: Plan
    kernels: Kernels
    start: Start = field(default_factory=Start)
    data: Fingerprint = ()
    notes: Sequence[str] = field(default_factory=tuple)
    origin: Origin | None = None


def prepare(request: Request, place: Place) -> Job:
    """The job that a request asks for. Raises UserError for anything that is wrong. Memory comes before tokenizer and
    data: whoever tries the 7B recipe on a laptop learns first that it does not fit."""
    switches = request.switches
    values, start = find_start(request.under, request.given)
    base, weights, resume = start.model(), start.weights, start.resume
    notes = [*request.notes]
    tokenizer, missing = _try_tokenizer(values, weights, resume, notes)
    notes += _vocabulary(values, base, tokenizer, weights)
    origin = _origin(weights, resume, tokenizer, notes)
    config = build(values, base)
    world = switches.world_size or place.world
    layout = check(config, world)
    if base is not None:
        _same_model(request.given, config.model, base, start.folder, grows=weights is not None)
    refuse_idle(request.flags, config)
    if config.save.out:
        config_to_hf(config.model, TokenIds())  # every checkpoint holds its config.json, so it must have one
    _check_folder(config, resume)
    if switches.check and config.save.out:
        check_lock(Path(config.save.out))
    device, here, dtype = _device_and_dtype(config, place, switches)
    try:
        kernels = choose(config.runtime.kernels, config.runtime.attention, device, dtype,
                         head_dim=config.model.head_dim, here=here)
    except KernelsUnavailable as error:
        raise UserError(str(error)) from None
    if device.type == "cuda":
        notes.append("bf16 products are summed in fp32 throughout (allow_bf16_reduced_precision_reduction is off)")
    capacity = memory_here(device, place, switches) if here else None
    if config.runtime.recompute == AUTO:
        plan, note = least_recompute(config, layout, dtype, kernels, capacity)
        notes.append(note)
    else:
        plan = estimate(config, layout, dtype, kernels=kernels)
    if resume is None and config.data.data and config.data.data == request.demo.get("data"):
        notes.append(f"no --data: taking the demo's, {shown(config.data.data)}")
    job = Job(config, layout, device, dtype, tokenizer, plan, kernels, start, (), notes, origin)
    if not switches.dry_run:
        assert capacity is not None, "only a dry run may plan for devices of another machine"
        require_memory(plan, capacity)
        if missing is not None:
            raise missing
        data = request.entry.check_data(config)
        job = replace(job, data=data, notes=[*notes, *copy_notes(data)])
        if not config.data.new_data:
            same_data(job.data, start)
    return job


def _device_and_dtype(config: RunConfig, place: Place, switches: Switches) -> tuple[torch.device, bool, torch.dtype]:
    """Where the run computes, whether this machine has such a device, and in what. `auto` is what this machine has,
    in a dry run too; but a dry run may ask for --device cuda where there is none."""
    runtime = config.runtime
    here = not (switches.dry_run and runtime.device == "cuda" and not torch.cuda.is_available())
    device = choose_device(runtime.device, place.local_rank) if here else torch.device("cuda")
    if runtime.dtype != "auto":
        return device, here, DTYPES[runtime.dtype]
    return device, here, torch.bfloat16 if device.type == "cuda" else torch.float32


def memory_here(device: torch.device, place: Place, switches: Switches) -> Capacity:
    """The memory that a rank has on this machine. All processes of --world-size are this machine's, but for GPUs, of
    which each has one."""
    return capacity_of(device, switches.world_size or place.local_world)


def _same_model(given: Values, model: ModelConfig, base: ModelConfig, folder: Path, grows: bool) -> None:
    """A loaded model has the shape it has: a flag that says otherwise is a mistake, but for a vocabulary that `grows`.
    A recipe's own --model is none."""
    preset = str(given.get("model", ""))
    fault = preset_fault(preset, given, base)
    if fault is not None:
        raise UserError(f"--model {preset} contradicts {shown(folder)}, whose model {base.model} has "
                        f"{fault.replace('_', '-')} {getattr(base, fault)}; leave the flag out")
    ignored = ["model", "init_std"]
    if base.family != "gpt2":
        ignored.append("max_positions")  # where positions are not learned, they may be as many as one likes
    if grows and model.vocab_size > base.vocab_size:
        ignored.append("vocab_size")
    differ = [name for name, value in vars(base).items() if name not in ignored and getattr(model, name) != value]
    if differ:
        name = differ[0]
        raise UserError(f"--{name.replace('_', '-')} {getattr(model, name)} contradicts {shown(folder)}, whose model "
                        f"has {getattr(base, name)}; leave the flag out")


def _try_tokenizer(values: Values, weights: Resolved | None, resume: Path | None,
                   notes: list[str]) -> tuple[Tokenizer | None, UserError | None]:
    """The tokenizer, or what is wrong with it: a plan needs none, so the complaint waits until memory is known."""
    try:
        return _tokenizer(values, weights, resume, notes), None
    except UserError as error:
        return None, error


def _tokenizer(values: Values, weights: Resolved | None, resume: Path | None, notes: list[str]) -> Tokenizer | None:
    """The tokenizer of --tokenizer, else the one saved with the checkpoint; a resumed run keeps the one it had, and a
    loaded model may go on with one that has pieces added."""
    folder = _served(weights, resume)
    saved = load_tokenizer(str(folder)) if folder is not None and _has_tokenizer(folder) else None
    if not values.get("tokenizer"):
        return saved
    if resume is not None and saved is not None and not Path(str(values["tokenizer"])).exists():
        return saved  # the saved copy stands in for a folder that has moved
    path = str(values["tokenizer"])
    if not Path(path).exists():
        raise UserError(f"no tokenizer at {path}; tools/train_tokenizer.py trains one, and `make demo` makes the "
                        "demo's, with its corpus")
    asked = load_tokenizer(path)
    # Checkpoints once kept no tokenizer but of two kinds; its hash they have all told.
    known = saved.hash if saved is not None else open_checkpoint(resume).meta.get("tokenizer") if resume else None
    if isinstance(known, str) and asked.hash != known:
        other = f"--tokenizer {shown(path)} is not the one that {shown(folder)} was trained with"
        if resume is not None or saved is None:
            raise UserError(f"{other} (sha256 {asked.hash[:12]} and {known[:12]}); leave the flag out")
        reason = why_no_extension(asked, saved)
        if reason is not None:
            raise UserError(f"{other}, nor that one with pieces added: {reason}; give one that keeps all that the "
                            "model knows, or leave the flag out")
        notes.append(f"--tokenizer {shown(path)} takes the place of the one in {shown(folder)}: the same "
                     f"{saved.vocab_size:,} pieces and {asked.vocab_size - saved.vocab_size:,} more")
        return asked
    # A file by itself brings no settings and no chat template; the saved folder has those that belong to it.
    return saved if saved is not None and Path(path).is_file() else asked


def _served(weights: Resolved | None, resume: Path | None) -> Path | None:
    """The folder with what is beside the weights that a run starts from: config.json, tokenizer, chat template."""
    if resume is not None:
        return resume / "hf"
    if weights is None:
        return None
    return weights.folder if weights.kind == "hf" else weights.folder / "hf"


def _origin(weights: Resolved | None, resume: Path | None, tokenizer: Tokenizer | None,
            notes: list[str]) -> Origin | None:
    """What the model's folder says of serving it. Where it has no tokenizer and the run has one, the ids of special
    tokens are that one's: ids mean nothing but in their vocabulary."""
    folder = _served(weights, resume)
    if folder is None:
        return None
    origin, ids = read_origin(folder), token_ids(tokenizer)
    if tokenizer is None or _has_tokenizer(folder):
        return origin
    if origin.ids not in (ids, TokenIds()):
        notes.append(f"{shown(folder)} has no tokenizer: its ids of special tokens (bos {origin.ids.bos}, eos "
                     f"{origin.ids.eos}) give way to those of --tokenizer (bos {ids.bos}, eos {ids.eos})")
    return origin.without_ids()


def _has_tokenizer(folder: Path) -> bool:
    return is_tokenizer(tokenizer_files(folder))


def _vocabulary(values: Values, base: ModelConfig | None, tokenizer: Tokenizer | None,
                weights: Resolved | None) -> list[str]:
    """A new model takes the tokenizer's vocabulary unless --vocab-size says otherwise; a loaded one keeps its own, or
    grows where --vocab-size asks for more. UserError for fewer rows than pieces. Returns what is to be said."""
    pieces = tokenizer.vocab_size if tokenizer is not None else 0
    if base is None:
        if pieces and "vocab_size" not in values:
            values["vocab_size"] = pieces
            return [f"vocabulary of {pieces} pieces, from the tokenizer"]
        if values.get("vocab_size", pieces) < pieces:
            raise UserError(f"vocab-size {values['vocab_size']} is smaller than the tokenizer's {pieces} pieces; "
                            f"use --vocab-size {pieces} or another --tokenizer")
        return []
    rows = base.vocab_size
    size = values.get("vocab_size", rows)
    if weights is None:
        if rows < pieces:
            raise UserError(f"the tokenizer has {pieces} pieces and the run to be resumed {rows} rows for them; give "
                            f"the --tokenizer that it was trained with, or begin another run: --load it, with another "
                            f"--out and --vocab-size {pieces}")
        return []
    where = f"the model in {shown(weights.folder)}"
    if size < rows:
        raise UserError(f"--vocab-size {size} is less than the {rows} rows of {where}, and no row is dropped; leave "
                        f"the flag out{f', or use --vocab-size {pieces}' if pieces > rows else ''}")
    if size < pieces:
        raise UserError(f"the tokenizer has {pieces} pieces, and {where} {rows} rows for them; --vocab-size {pieces} "
                        "grows it: each new row is the mean of the old ones")
    return [f"vocabulary grown from {rows:,} to {size:,} rows: each new one is the mean of the old ones"] * (
        size > rows)


def _check_folder(config: RunConfig, resume: Path | None) -> None:
    """A run folder is written by one run: checkpoints in it are continued or left alone."""
    if not config.save.out or resume is not None:
        return
    out = Path(config.save.out)
    above = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    if not above.is_dir():
        raise UserError(f"--out {out} cannot be written: {above} is not a folder; give another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written: {above} is read-only for this user; give another --out")
    if latest_step(out) is not None:
        raise UserError(f"{out} holds checkpoints of an earlier run; continue it with --resume, or give another --out")
