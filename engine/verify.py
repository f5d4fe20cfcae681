"""Does this layout compute the run of one process? `torchrun --nproc-per-node N -m engine.verify --tp 2 --pp 2 ...`

Trains the asked layout and then, on rank 0 alone, one process with the same config on the same synthetic tokens, and
compares the samples that every rank reads, initial weights (bit for bit, in each dp copy), the first step's gradients
tensor by tensor, and each step's loss and gradient norm. Flags are those of pretraining; without them a toy model in
fp64. Exit code 0 when equal, 1 when not.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Layout, ParallelConfig, RunConfig
from engine.data.batches import Batch
from engine.errors import UserError, shown
from engine.kernels.cross_entropy import IGNORE
from engine.kernels.dispatch import Kernels
from engine.mesh import AXES, Mesh
from engine.model.shapes import logical_shapes
from engine.parallel.sharding import Entry, pieces, shard_of
from engine.train.engine import Engine
from engine.train.entry import only_told, prepared, print_help, run_entry
from engine.train.gather import gathered
from engine.train.place import Place
from engine.train.request import EntryPoint, Request, read_request, take_switches
from engine.train.settle import settled

SHAPE: Mapping[str, Any] = MappingProxyType({
    "layers": 8, "hidden": 32, "ffn_hidden": 64, "heads": 8, "kv_heads": 2, "vocab_size": 101})
"""The toy model: kv heads that tp 4 repeats, a vocabulary that nothing divides."""
DEFAULTS: Mapping[str, Any] = MappingProxyType({
    "dtype": "fp64", "seq_len": 16, "global_batch": 8, "steps": 20, "lr": 1e-3, "warmup": 3})
"""A rate of 1e-2 would do for any layout's first step, but over 20 steps training itself magnifies rounding beyond the
bounds."""
UNREAD: Mapping[str, str] = MappingProxyType({
    **dict.fromkeys(("data", "valid_data", "new_data", "verify_data", "split", "ignore_keys", "tokenizer",
                     "chat_template", "load", "resume", "resume_from"),
                    "verification trains on tokens and weights made from --seed"),
    **dict.fromkeys(("out", "save_every", "save_wait", "keep", "log_every", "peak_tflops"),
                    "verification writes nothing"),
    **dict.fromkeys(("eval_every", "eval_samples"), "verification evaluates nothing"),
    "skip_nonfinite": "verification compares every step",
    **dict.fromkeys(("stop_after", "epochs", "requeue_exit"), "verification runs all of --steps")})
"""Flags that mean nothing here."""


@dataclass(frozen=True)
class Bounds:
    """The largest relative differences that count as equal; the norm of fp32 runs has none."""

    loss: float
    norm: float
    gradient: float


BOUNDS: Mapping[str, Bounds] = MappingProxyType({
    "fp64": Bounds(1e-10, 1e-10, 1e-10), "fp32": Bounds(1e-5, float("inf"), 5e-6)})


@dataclass(frozen=True)
class Trace:
    """What a run leaves to compare: (loss, gradient norm) of each step, whole tensors of the first dp copy by logical
    name, how many elements of the other copies differ from it, and checksums of the samples [steps, global batch].
    NaN stands where the ranks do not agree on what they hold."""

    curve: list[tuple[float, float]]
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    copies: dict[str, float]
    samples: torch.Tensor


def main(argv: Sequence[str]) -> int:
    """Runs one rank and returns its exit code."""
    return run_entry(lambda place: _verify(argv, place), argv)


def _verify(argv: Sequence[str], place: Place) -> int:
    if take_switches(argv)[0].help:
        return print_help(ENTRY) if place.rank == 0 else 0
    request = _request(argv)
    job = prepared(request, place)
    if only_told(job, place, request, None):
        return 0
    with gathered(job, place) as mesh:
        config = settled(job, mesh).plan.config
        found = trace(config, mesh, job.device, job.dtype, job.kernels)
        verdict = torch.zeros((), device=job.device)
        if place.rank == 0:
            single = Mesh(Layout(), 0, dict.fromkeys(AXES, 0), heart=mesh.heart)
            wanted = trace(alone(config), single, job.device, job.dtype, job.kernels)
            verdict += 0 if report(found, wanted, config, str(job.layout)) else 1
        if place.world > 1:
            with mesh.heart.waits():  # the others wait here while rank 0 trains alone
                dist.broadcast(verdict, 0)
        return int(verdict)


ENTRY = EntryPoint("engine.verify", UNREAD, lambda config: (), DEFAULTS)


def _request(argv: Sequence[str]) -> Request:
    """What is asked for. The usual model is the toy; a run folder's config.yaml brings its own, and its --dtype auto
    is fp64 here."""
    request = read_request(ENTRY, argv)
    given = request.given
    if given.get("dtype") == "auto" and "dtype" not in request.flags:
        given = {name: value for name, value in given.items() if name != "dtype"}
    dtype = str(given.get("dtype", DEFAULTS["dtype"]))
    if dtype not in BOUNDS:
        raise UserError(f"--dtype {shown(dtype, 80)}: layouts are compared in {' or '.join(BOUNDS)}")
    return replace(request, given=given, under={**request.under, **({} if "model" in given else SHAPE)})


def alone(config: RunConfig) -> RunConfig:
    """The same run on one process."""
    return replace(config, parallel=ParallelConfig())


def trace(config: RunConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype,
          kernels: Kernels | None = None) -> Trace:
    """Trains from the initial weights to the last step; called by every rank of the mesh."""
    engine = Engine(config, mesh, device, dtype, kernels)
    engine.initialize()
    weights = gather(local_weights(engine), config, mesh, "model")  # each dp copy is whole in itself
    copies = copies_apart(weights, mesh, "")
    engine.optimizer.config = replace(config.optimizer, clip=0.0)  # a clipped shard would not be the gradient
    read: list[Batch] = []
    curve = train(engine, 1, read)
    gradients = gather(local_gradients(engine), config, mesh, "world")  # each dp rank has its rows of the sum
    engine.optimizer.config = config.optimizer
    curve += train(engine, config.batch.steps - 1, read)
    copies |= copies_apart(gather(local_weights(engine), config, mesh, "model"), mesh, " after the last step")
    return Trace(curve, weights, gradients, copies, gather_samples(read, config, mesh, device))


def train(engine: Engine, steps: int, read: list[Batch] | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next steps, on synthetic batches; this rank's part of them is added to `read`."""
    found = []
    for _ in range(steps):
        batch = make_batch(engine.config, engine.step, engine.mesh.dp, engine.mesh.size("dp"))
        if read is not None:
            read.append(batch)
        result = engine.train_step(batch)
        found.append((result.loss, result.grad_norm))
    return found


def make_batch(config: RunConfig, step: int, dp_rank: int, dp: int) -> Batch:
    """A dp rank's part of a step's random batch; a quarter of the labels are not supervised, unevenly over the rows."""
    rng = np.random.default_rng([config.runtime.seed, step])
    rows = rng.integers(0, config.model.vocab_size, (config.batch.global_batch, config.batch.seq_len + 1))
    labels = rows[:, 1:].copy()
    labels[rng.random(labels.shape) < np.linspace(0, 0.5, len(rows))[:, None]] = IGNORE
    share = slice(dp_rank * len(rows) // dp, (dp_rank + 1) * len(rows) // dp)
    begins = rng.random(labels.shape) < 0.2 if config.data.mask_documents else None
    return Batch(rows[share, :-1], labels[share], None if begins is None else begins[share])


def local_weights(engine: Engine) -> list[Entry]:
    """Every rectangle of every local parameter."""
    return [Entry("model", piece, parameter.detach()[slice(*piece.rows)])
            for model in engine.models() for parameter in model.parameters()
            for piece in pieces(shard_of(parameter), 0, parameter.shape[0])]


def local_gradients(engine: Engine) -> list[Entry]:
    """The last step's gradients, summed over everything, in this rank's shard of the optimizer."""
    return [Entry("gradient", piece, bucket.shard_grads[span].view(piece.extent))
            for bucket in engine.optimizer.buckets for piece, span in bucket.shard_pieces()]


Window = tuple[slice, ...]


def gather(entries: Iterable[Entry], config: RunConfig, mesh: Mesh, over: str) -> dict[str, torch.Tensor]:
    """Whole tensors on every rank, put together over the mesh's group `over`, in which each element has one holder."""
    held: dict[str, list[tuple[Window, torch.Tensor, bool]]] = {}
    for entry in entries:
        window = tuple(slice(a, a + n) for a, n in zip(entry.piece.start, entry.piece.extent, strict=True))
        held.setdefault(entry.piece.member.name, []).append((window, entry.tensor, entry.piece.member.primary))
    sample = next((part[1] for parts in held.values() for part in parts), torch.zeros(()))
    kind = torch.float64 if config.runtime.dtype == "fp64" else torch.float32
    return {name: _whole(torch.zeros(shape, dtype=kind, device=sample.device), held.get(name, []), mesh, over)
            for name, shape in logical_shapes(config.model).items()}


def _whole(values: torch.Tensor, parts: Sequence[tuple[Window, torch.Tensor, bool]], mesh: Mesh,
           over: str) -> torch.Tensor:
    """The sum over a group of each rank's primary parts in a tensor of zeros: one rank's number plus zeros, so exact.

    Elements that nobody or several hold would make a wrong sum: they are set to NaN, which no comparison passes.
    Parts that are not primary must agree with the whole bit for bit, else they too leave a NaN.
    """
    holders, differ = torch.zeros_like(values), torch.zeros_like(values)
    for window, tensor, primary in parts:
        if primary:
            values[window] = tensor.to(values.dtype)
            holders[window] += 1
    _sum(values, mesh, over)
    _sum(holders, mesh, over)
    for window, tensor, _ in parts:
        differ[window] = (values[window] != tensor.to(values.dtype)).to(values.dtype)
    _sum(differ, mesh, over)
    return values.masked_fill((holders != 1) | (differ > 0), float("nan"))


def _sum(x: torch.Tensor, mesh: Mesh, over: str) -> None:
    group = mesh.group(over)
    if group is not None:
        group.all_reduce_(x)


def copies_apart(weights: Mapping[str, torch.Tensor], mesh: Mesh, when: str) -> dict[str, float]:
    """For each tensor of each dp copy how many of its elements differ from those of the first copy; `when` is added to
    the names."""
    found = {}
    for name, tensor in weights.items():
        first = tensor.clone() if mesh.dp == 0 else torch.zeros_like(tensor)
        _sum(first, mesh, "dp")
        counts = torch.zeros(mesh.size("dp"), dtype=torch.float64, device=tensor.device)
        counts[mesh.dp] = (tensor != first).sum()
        _sum(counts, mesh, "dp")
        found.update({f"{name} of dp copy {i}{when}": count for i, count in enumerate(counts.tolist())})
    return found


def gather_samples(read: Sequence[Batch], config: RunConfig, mesh: Mesh, device: torch.device) -> torch.Tensor:
    """Checksums [steps, global batch] of the samples that the ranks have read: tokens, labels, documents. All ranks of
    a dp copy must have read the same; one of them counts as the holder."""
    rows = torch.tensor([[_checksum(batch, row) for row in range(len(batch.tokens))] for batch in read],
                        dtype=torch.float64, device=device)
    low = mesh.dp * rows.shape[1]
    whole = torch.zeros(len(read), config.batch.global_batch, dtype=torch.float64, device=device)
    return _whole(whole, [((slice(None), slice(low, low + rows.shape[1])), rows, mesh.tp == mesh.pp == 0)], mesh,
                  "world")


def _checksum(batch: Batch, row: int) -> int:
    """crc32 of all that one row of a batch holds."""
    parts = [batch.tokens[row], batch.labels[row], *([] if batch.begins is None else [batch.begins[row]])]
    return zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))


def gradient_errors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """||d|| / max(||g||, 1e-6 of the whole norm) of each tensor.

    In fp32 a key bias is left out: softmax does not see a shift of all keys, so its gradient is rounding alone.
    """
    whole = float(torch.stack([g.double().square().sum() for g in wanted.values()]).sum().sqrt())
    return {name: float((found[name] - g).double().norm()) / max(float(g.double().norm()), 1e-6 * whole, 1e-300)
            for name, g in wanted.items() if g.dtype == torch.float64 or not name.endswith("k_proj.bias")}


def worst(errors: Mapping[Any, float]) -> tuple[float, Any]:
    """The largest error and where it is; NaN is larger than anything."""
    place = max(errors, key=lambda key: float("inf") if errors[key] != errors[key] else errors[key])
    return errors[place], place


def relative(found: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Relative differences by step."""
    return {f"step {i + 1}": abs(a - b) / abs(b) for i, (a, b) in enumerate(zip(found, wanted, strict=True))}


def report(found: Trace, wanted: Trace, config: RunConfig, layout: str) -> bool:
    """Prints the worst figures and the verdict; returns whether the two runs are equal."""
    bounds = BOUNDS[config.runtime.dtype]
    bits = {name: float((found.weights[name] != tensor).sum()) for name, tensor in wanted.weights.items()}
    samples = {f"step {step + 1}, sample {sample + 1}": float(differs) for step, row in
               enumerate((found.samples != wanted.samples).tolist()) for sample, differs in enumerate(row)}
    figures = [
        ("samples that differ", worst(samples), 0.0),
        ("initial weights, elements that differ", worst(bits), 0.0),
        ("dp copies, elements unlike the first", worst(found.copies), 0.0),
        ("first gradient of a tensor", worst(gradient_errors(found.gradients, wanted.gradients)), bounds.gradient),
        ("loss of a step", worst(relative(*([x for x, _ in run.curve] for run in (found, wanted)))), bounds.loss),
        ("gradient norm of a step", worst(relative(*([x for _, x in run.curve] for run in (found, wanted)))),
         bounds.norm)]
    model = config.model
    print(f"{layout} against one process: {model.family}, {model.layers} layers of {model.hidden}, "
          f"{config.runtime.dtype}, {config.batch.steps} steps")
    print(f"{'':38} {'worst':>9}  {'bound':>7}  where")
    for what, (error, place), bound in figures:
        print(f"{what:38} {error:9.2e}  {bound:7.0e}  {place if error else ''}")
    equal = all(error <= bound for _, (error, _), bound in figures)
    print("equal" if equal else "differs", flush=True)
    return equal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
