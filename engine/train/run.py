"""A job on its ranks: mesh, engine, weights, callbacks, the loop, and an orderly end."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import engine as triax
from engine.checkpoint import Checkpoint, TensorSource, load_weights, save_checkpoint
from engine.checkpoint.background import BackgroundSave, Saved
from engine.checkpoint.folders import go_back, tidy
from engine.checkpoint.grow import grown
from engine.checkpoint.source import refuse_nonfinite
from engine.comm.heart import Phase
from engine.config import to_dict, to_yaml
from engine.data.batches import Batch, Batches, rows_of, share_of
from engine.errors import UserError, shown
from engine.hf import assets_for, open_hf, token_ids
from engine.hf.serving import replaced
from engine.mesh import Mesh
from engine.model.shapes import VOCABULARY, logical_shapes
from engine.plan import peak_flops
from engine.train.agree import agreed
from engine.train.callbacks import (
    Callback,
    CollectGarbage,
    Console,
    Evaluate,
    Save,
    StepRecord,
    WatchFolder,
    metrics_line,
)
from engine.train.engine import Engine
from engine.train.gather import gathered
from engine.train.job import Job
from engine.train.launch import Diverged
from engine.train.lines import JsonLines
from engine.train.lock import RunLock
from engine.train.loop import train
from engine.train.place import Place
from engine.train.settle import settled
from engine.train.signals import StopRequest

EVALUATED_AT_ONCE = 8
"""Micro-batches of a stage between two looks at whether the run shall stop."""


@dataclass(frozen=True)
class Feed:
    """What an entry point feeds a run with: training steps, held-back sequences (whole, not yet shared), a summary, the
    samples in one pass over the data, and the chat template that the model learns, which its checkpoints then carry."""

    batches: Batches
    valid: Batch | None
    summary: str
    epoch_size: int
    chat_template: str | None = None


MakeFeed = Callable[[Job, Mesh, int], Feed]
"""(job, mesh, samples already consumed minus step * global_batch) -> Feed."""


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """This rank's rows of a checkpoint's weights and optimizer state, and its step, whatever layout wrote it; the other
    rows come by `engine.optimizer.gather()`. Raises UserError where it does not fit."""
    entries = list(engine.optimizer.entries())
    checkpoint.load(entries, expected=logical_shapes(engine.config.model))
    refuse_nonfinite(str(checkpoint.folder), entries)
    engine.step = checkpoint.step
    engine.optimizer.steps = checkpoint.optimizer_steps


def run(job: Job, place: Place, make_feed: MakeFeed, stop: StopRequest) -> int:
    """Runs a job on this rank to its end; returns the exit code."""
    out = job.config.save.out
    locks: list[RunLock] = []
    with ExitStack() as stack:
        def lock() -> None:
            if place.rank == 0 and out:
                locks.append(stack.enter_context(RunLock(Path(out))))
                tidy(Path(out) / "checkpoints")

        with gathered(job, place, lock) as mesh:
            finished = _Session(job, place, mesh, make_feed, stop, locks[0] if locks else None).run()
    return 0 if finished else stop.code


class _Session:
    """One rank's state between the mesh and the loop."""

    def __init__(self, job: Job, place: Place, mesh: Mesh, make_feed: MakeFeed, stop: StopRequest,
                 lock: RunLock | None) -> None:
        job = settled(job, mesh)
        self.job, self.place, self.mesh = job, place, mesh
        self.stop = stop
        self.out = Path(job.config.save.out) if job.config.save.out else None
        self.engine = Engine(job.plan.config, mesh, job.device, job.dtype, job.kernels)
        self.guard = WatchFolder(lock.in_place, self.stop.request) if lock is not None else None
        self.origin = agreed(self._start, mesh, job.device)
        self.engine.optimizer.gather()  # each dp rank has read its own rows
        self.feed = agreed(lambda: make_feed(job, mesh, self.origin), mesh, job.device)
        self.assets = self._assets() if place.rank == 0 and self.out is not None else {}
        if job.start.weights is not None:
            job.start.weights.release()  # all of it has been read, and this run may take weeks
        self.lines: list[JsonLines] = []
        self.saving: BackgroundSave | None = None
        if self.out is not None:
            self.saving = self.engine.rider = BackgroundSave(
                self.out / "checkpoints", rank=place.rank, world=place.world, agree=self.engine.agree,
                device=job.device, told=self._say_saved)

    def say(self, line: str) -> None:
        """A line of the start-up report; rank 0 speaks."""
        if self.place.rank == 0:
            print(line, flush=True)

    def _start(self) -> int:
        """Initial, loaded or resumed weights and state; returns the samples consumed beyond step * global_batch."""
        job, engine = self.job, self.engine
        expected = logical_shapes(job.config.model)
        start = job.start
        if start.resume is not None:
            assert start.checkpoint is not None
            checkpoint = start.checkpoint
            restore(engine, checkpoint)
            return checkpoint.samples - checkpoint.step * job.config.batch.global_batch
        if start.weights is not None:
            source: TensorSource = open_hf(start.weights.folder) if start.checkpoint is None else (
                start.checkpoint.source())
            own = [entry for entry in engine.optimizer.entries() if entry.kind in ("model", "master")]
            load_weights(grown(source, expected, VOCABULARY), own, expected)
            return 0
        engine.initialize()
        return 0

    def run(self) -> bool:
        """Says what will run, runs it, and says how it ended; returns False when a signal ended it early."""
        config = self.job.config
        self._report()
        if self.engine.step >= config.batch.steps:
            self.say(f"nothing to do: step {self.engine.step} of {config.batch.steps} is done; raise --steps to go on")
            return True
        console = Console(config.batch.steps, self.engine.step, config.save.log_every) if self.place.rank == 0 else None
        try:
            with self._last_save():
                finished = train(self.engine, self.feed.batches, self._callbacks(console), self._mfu, self.stop)
        finally:
            if console is not None:
                console.close()
        agreed(self._check_folder, self.mesh, self.job.device)
        where = f"; checkpoint {self.out / 'checkpoints' / 'latest'}" if self.out else ""
        how = "done" if finished else f"stopped by {self.stop.name}"
        self.say(f"{how} at step {self.engine.step} of {config.batch.steps}{where}")
        return finished

    def _callbacks(self, console: Console | None) -> list[Callback]:
        save = self.job.config.save
        callbacks: list[Callback] = []
        if self.feed.valid is not None:
            share = share_of(self.feed.valid, self.mesh.dp, self.mesh.size("dp"))
            parts = rows_of(share, EVALUATED_AT_ONCE * self.mesh.size("pp") * self.job.config.batch.micro_batch)
            callbacks.append(Evaluate(save.eval_every, lambda: self.engine.evaluate(parts, lambda: self.stop.asked)))
        self.lines = agreed(self._open_folder, self.mesh, self.job.device)
        callbacks += self.lines
        if self.out is not None:  # after its lines: a run that dies in between writes them again, and misses none
            callbacks.append(Save(save.save_every, self._save, save.save_wait, self.mesh.heart))
        if self.guard is not None:
            callbacks.append(self.guard)
        if console is not None:
            callbacks.append(console)
        callbacks.append(CollectGarbage())
        return callbacks

    def _open_folder(self) -> list[JsonLines]:
        """Rank 0: makes the run folder that of a run which goes on from this step."""
        if self.out is None or self.place.rank > 0:
            return []
        try:
            go_back(self.out / "checkpoints", self.engine.step)
            _write_facts(self.out, self.job)
        except OSError as error:
            raise UserError(f"--out {shown(self.out)} cannot be written: {error.strerror or error}") from None
        lines = [JsonLines(self.out / "metrics.jsonl", self.engine.step, metrics_line),
                 JsonLines(self.out / "samples.jsonl", self.engine.step, self._samples_line)]
        for item in lines:
            if item.note is not None:
                self.say(item.note)
        return lines

    def _check_folder(self) -> None:
        """Rank 0: UserError where the run folder was not there any more at some step."""
        if self.guard is not None and self.guard.lost is not None:
            raise UserError(f"--out {shown(self.out)} was deleted or replaced under the run, which was seen at step "
                            f"{self.guard.lost}: the checkpoint of step {self.engine.step} stands there anew, and what "
                            "was there before (config.yaml, metrics.jsonl, other checkpoints) is lost; go on with "
                            "--resume")

    def _samples_line(self, record: StepRecord) -> dict[str, Any]:
        """Which samples a step read: numbers and a checksum that is the same for every layout."""
        count = self.job.config.batch.global_batch
        return {"step": record.step, "first": self.origin + (record.step - 1) * count, "count": count,
                "crc": record.crc}

    def _save(self, wait: bool, skipped: bool) -> None:
        """Saves this step: at once, or by `saving` while the next steps train."""
        assert self.out is not None and self.saving is not None
        job, engine = self.job, self.engine
        # Weights that give NaN may be broken for good: what was saved before is then all that is left of the run.
        keep = 0 if skipped else job.config.save.keep
        meta = {"samples": self.origin + engine.step * job.config.batch.global_batch, "config": to_dict(job.config),
                "world": vars(job.layout), "optimizer_steps": engine.optimizer.steps,
                "tokenizer": job.tokenizer.hash if job.tokenizer else None, "data": list(job.data)}
        if not wait:
            self.saving.save(engine.step, engine.optimizer.entries(), meta=meta, assets=self.assets,
                             keep=keep, before=self._sync_lines)
            return
        self.saving.finish()
        start = time.perf_counter()
        self._sync_lines()
        folder = save_checkpoint(
            self.out / "checkpoints", engine.step, engine.optimizer.entries(), rank=self.place.rank,
            world=self.place.world, agree=engine.agree, meta=meta, assets=self.assets, keep=keep)
        self.say(f"saved {folder} in {time.perf_counter() - start:.2f} s")

    def _sync_lines(self) -> None:
        for item in self.lines:
            item.sync()

    def _say_saved(self, saved: Saved) -> None:
        self.say(f"saved {saved.folder} in {saved.seconds:.2f} s, for which training stood still {saved.waited:.2f} s")

    @contextmanager
    def _last_save(self) -> Iterator[None]:
        """What a run that ends by an error owes to the save under way: to end it where all ranks know of the error, and
        else to leave nothing half-written."""
        try:
            yield
        except (Diverged, UserError) as error:
            if self.saving is not None:
                self.mesh.heart.enter(Phase.SAVE)
                if isinstance(error, Diverged) or self.place.world == 1:
                    try:
                        self.saving.finish()
                    except UserError as other:  # the run ends by the error that came first
                        self.say(f"error: {other}")
                else:
                    self.saving.abandon()
            raise

    def _assets(self) -> dict[str, bytes]:
        """The files an export needs, read once: the folder they come from may be pruned or deleted meanwhile."""
        found = assets_for(self.job.config.model, self.job.tokenizer, template=self.feed.chat_template,
                           origin=self.job.origin)
        return {name: item if isinstance(item, bytes) else item.read_bytes() for name, item in found.items()}

    def _mfu(self, flops_per_s: float) -> float | None:
        """Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B), where the device's peak is known."""
        peak = self.job.config.runtime.peak_tflops * 1e12 or None
        if peak is None and self.job.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self.job.device), self.job.dtype)
        return flops_per_s / (peak * self.place.world) if peak else None

    def _report(self) -> None:
        """Everything derived, before the first step."""
        job = self.job
        self.say(f"Triax {triax.__version__} · torch {torch.__version__} · {self.mesh} · {job.device} · "
                 f"{str(job.dtype).removeprefix('torch.')} · {torch.get_num_threads()} threads a process")
        self.say(job.plan.report())
        for note in job.notes:
            self.say(note)
        if job.origin is not None:
            name = job.config.data.chat_template
            line = replaced(token_ids(job.tokenizer), job.origin, self.feed.chat_template, name)
            if line is not None:
                self.say(line)
        self.say(self.feed.summary)
        self.say(str(job.kernels))
        if self.mesh.groups:
            self.say(f"collectives: {self.mesh.transport}")
        if self.out is None:
            self.say("no --out: nothing of this run is saved")
        if job.start.resume is not None:
            self.say(f"resumed {job.start.resume} at step {self.engine.step}")
        elif job.start.weights is not None:
            self.say(f"weights of {job.start.weights.folder}, a fresh optimizer")


def _write_facts(out: Path, job: Job) -> None:
    """config.yaml, which --config reads back, and env.json."""
    config = replace(job.config, save=replace(job.config.save, resume=False, resume_from=None))
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    packages = ("torch", "numpy", "triton", "sentencepiece", "safetensors")
    facts = {"triax": triax.__version__, "python": platform.python_version(), "platform": platform.platform(),
             "command": sys.argv, "world": vars(job.layout), "device": _device_name(job.device),
             "cores": os.cpu_count(), "packages": {name: _version(name) for name in packages}}
    (out / "env.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
