"""The frame of an entry point: switches, preparation, and then the run, or what is said instead of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction

import torch

from engine.config import Layout, ModelConfig, check, describe
from engine.errors import UserError, print_all, replace_unprintable, shown
from engine.mesh import AXES, Mesh
from engine.plan import require_memory
from engine.plan.capacity import gpu_that_holds, margin_text
from engine.plan.units import bytes_text
from engine.train.job import Job, memory_here, prepare
from engine.train.launch import run_rank, tune_allocator
from engine.train.place import Place
from engine.train.rendezvous import refuse
from engine.train.request import EntryPoint, Request, read_request, take_switches
from engine.train.run import Feed, MakeFeed, run
from engine.train.signals import REQUEUE, STOPPED, StopRequest
from engine.train.start import start_notes


def enter(entry: EntryPoint, argv: Sequence[str], recipe: Sequence[str], demo: Sequence[str],
          make_feed: MakeFeed) -> int:
    """Runs one rank of an entry point and returns its exit code: 0, 1 for a crash, 2 for bad input, 75 for a run that a
    signal has stopped under --requeue-exit. `recipe` holds a recipe's own flags, `demo` its data for whoever brings
    none; --config and the flags of `argv` win over both."""
    tune_allocator()

    def body(place: Place) -> int:
        if take_switches(argv)[0].help:
            return print_help(entry) if place.rank == 0 else 0
        request = read_request(entry, argv, recipe, demo)
        code = REQUEUE if request.given.get("requeue_exit") else STOPPED
        with StopRequest(lambda code, line: refuse(place, code, line, patience=1.0, open_store=False), code) as stop:
            job = in_steps(prepared(request, place), make_feed)
            job = replace(job, notes=[*job.notes, *start_notes(job.start, job.config)])
            if only_told(job, place, request, make_feed):
                return 0
            stop.code = REQUEUE if job.config.runtime.requeue_exit else STOPPED  # as the resumed run has it
            return run(job, place, make_feed, stop)

    return run_entry(body, argv)


def run_entry(body: Callable[[Place], int], argv: Sequence[str]) -> int:
    """`run_rank`, on streams that a terminal's encoding cannot break."""
    replace_unprintable()
    # The bash form of a recipe checks the flags of a whole world in one process, which srun may have started.
    return run_rank(body, alone="--check" in argv and any(word.split("=")[0] == "--world-size" for word in argv))


def prepared(request: Request, place: Place) -> Job:
    """`prepare`, where a path that the system refuses (a name too long, no permission) is bad input too."""
    try:
        return prepare(request, place)
    except OSError as error:
        if not isinstance(error.filename, str):
            raise
        raise UserError(f"{shown(error.filename)}: {error.strerror}") from None


def print_help(entry: EntryPoint) -> int:
    """Every flag that the entry point reads."""
    print_all(f"torchrun [--nproc-per-node N] -m {entry.name} [options]\n"
              "  --check [--world-size N]    check every rule, read the data as the run would, give a verdict, stop\n"
              "  --dry-run [--world-size N]  check every rule and print layout and memory, then stop\n\n"
              f"{describe(without=entry.unread)}")
    return 0


def in_steps(job: Job, make_feed: MakeFeed) -> Job:
    """The job with its --epochs as --steps: as many as it takes to see every sample so often."""
    epochs, global_batch = job.config.batch.epochs, job.config.batch.global_batch
    if not epochs:
        return job
    size = alone(job, make_feed).epoch_size
    steps = math.ceil(Fraction(str(epochs)) * size / global_batch)
    config = replace(job.config, batch=replace(job.config.batch, steps=steps, epochs=0.0))
    check(config, job.layout.world)
    note = f"--epochs {epochs:g}: {size:,} samples an epoch, {global_batch} a step, so {steps:,} steps"
    return replace(job, config=config, plan=replace(job.plan, config=replace(job.plan.config, batch=config.batch)),
                   notes=[*job.notes, note])


def alone(job: Job, make_feed: MakeFeed) -> Feed:
    """What one process would be fed with, from the step where the run begins."""
    return make_feed(job, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), start(job)[1])


def start(job: Job) -> tuple[int, int]:
    """The step at which the run begins, and the samples consumed beyond step * global_batch."""
    checkpoint = job.start.checkpoint
    if job.start.resume is None or checkpoint is None:
        return 0, 0
    return checkpoint.step, checkpoint.samples - checkpoint.step * job.config.batch.global_batch


def only_told(job: Job, place: Place, request: Request, make_feed: MakeFeed | None) -> bool:
    """Whether --check or --dry-run asks for words instead of a run; rank 0 prints them. `make_feed` is None where a run
    reads no data. Raises UserError where --check finds data that the run could not read."""
    switches = request.switches
    if switches.dry_run and request.entry.loads and not job.start.folder.name and not shape(request):
        raise UserError("a dry run of tuning needs a model to plan for: give its folder with --load, or a shape with "
                        "--model or --layers, --hidden, ..")
    if (switches.check or switches.dry_run) and place.rank == 0:
        lines = [*job.notes, f"{request.entry.name}: {name(job)}"]
        if switches.check:
            lines += [_read(job, make_feed)] if make_feed is not None else []
        else:
            lines += [job.plan.report(), *([_try_to_read(job, request, make_feed)] if make_feed is not None else [])]
        lines.append(fits(job, place, request))
        print_all("\n".join([*lines, "sound; nothing was started"] if switches.check else lines))
    return switches.check or switches.dry_run


def shape(request: Request) -> set[str]:
    """The fields of the model that somebody has named."""
    return {field.name for field in fields(ModelConfig)} & {*request.given, *request.under}


def _read(job: Job, make_feed: MakeFeed) -> str:
    """What the data are, once the first step of all ranks has been read."""
    feed, step = alone(job, make_feed), start(job)[0]
    if step < job.config.batch.steps:
        feed.batches.step(step)
    return feed.summary


def _try_to_read(job: Job, request: Request, make_feed: MakeFeed) -> str:
    """What the data are, or why the run itself would stop at them: a plan needs none."""
    try:
        request.entry.check_data(job.config)
        return _read(job, make_feed)
    except UserError as error:
        return f"the run itself would stop at its data: {error}"


def name(job: Job) -> str:
    """What would run, in a few words."""
    dtype = str(job.dtype).removeprefix("torch.")
    return f"{job.config.model.model} in {dtype} on {job.device.type}, {job.layout}"


def fits(job: Job, place: Place, request: Request) -> str:
    """Whether this machine holds the run, in one line."""
    need = job.plan.heaviest.memory.total
    if job.device.type == "cuda" and not torch.cuda.is_available():
        return (f"this machine has no GPU that PyTorch sees; each one would need {bytes_text(need)}, so a GPU of "
                f"{bytes_text(gpu_that_holds(need, job.layout))} (kept free: {margin_text(job.layout)})")
    capacity = memory_here(job.device, place, request.switches)
    try:
        require_memory(job.plan, capacity)
    except UserError as error:
        return f"this machine does not hold it: {error}"
    return f"this machine holds it: the fullest rank needs {bytes_text(need)}, {capacity.text(job.layout)}"
