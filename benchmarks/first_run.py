"""The first minutes on a GPU: is every kernel right, is a step by Triton that by torch, how fast is the 7B step?

    python3 benchmarks/first_run.py [ops] [step] [full] [--save DIR] [--tiny]

Each check says PASS or FAIL for itself and the next one goes on, until the CUDA context is lost. `ops` holds kernels
in bf16 against torch in fp32, twice for equal bits; `step` trains a 7B-wide model of two layers by Triton's kernels and
by torch's; `full` times the whole 7B step. --tiny rehearses all of it on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import RESULTS, fill, keep, machine  # noqa: E402

from engine.checkpoint import alone, open_checkpoint  # noqa: E402
from engine.checkpoint.background import BackgroundSave, Saved  # noqa: E402
from engine.config import Layout, parse, to_dict  # noqa: E402
from engine.data.batches import Batch  # noqa: E402
from engine.kernels import activation, adamw, cross_entropy, dropout, gradient_norm, norm, rope, softmax  # noqa: E402
from engine.kernels.attention import attention  # noqa: E402
from engine.kernels.dispatch import Kernels, choose  # noqa: E402
from engine.mesh import AXES, Mesh  # noqa: E402
from engine.model.shapes import logical_shapes  # noqa: E402
from engine.plan import flops_per_token, peak_flops  # noqa: E402
from engine.train.engine import Engine  # noqa: E402
from engine.train.launch import choose_device, expand_segments  # noqa: E402

Tensor = torch.Tensor
Function = Callable[..., Any]
expand_segments()
DEVICE = choose_device("cpu" if TINY else "auto", 0)
BF16 = torch.bfloat16
TOKENS, HIDDEN, FFN, VOCAB, HEAD, SEQ = (9, 64, 96, 300, 16, 20) if TINY else (8192, 4096, 11008, 32000, 128, 4096)
MODEL = ("--layers 2 --hidden 64 --ffn-hidden 96 --heads 2 --kv-heads 1 --vocab-size 300" if TINY else "--model 7b")
COMPARED, TIMED, MICRO_BATCHES = (1, 2, 1) if TINY else (3, 4, 16)
"""Steps of a run that is compared, of one that is timed (the first compiles and is left out), and how many sequences a
timed step has."""


@dataclass
class Report:
    """What was checked and what came out."""

    start: float = field(default_factory=time.perf_counter)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, body: Callable[[], str | None]) -> None:
        """Runs one check; it fails by raising. A lost CUDA context ends the program: nothing after it has a meaning."""
        began = time.perf_counter()
        try:
            found, how = body(), "PASS"
            wait()
        except Exception as error:
            traceback.print_exc(limit=-3, file=sys.stdout)
            found, how = f"{type(error).__name__}: {str(error)[:300]}", "FAIL"
        self.checks.append({"name": name, "how": how, "seconds": time.perf_counter() - began, "found": found})
        print(f"[{time.perf_counter() - self.start:6.1f}] {how} {name} {found or ''}", flush=True)
        if how == "FAIL" and "CUDA error" in str(found):
            raise SystemExit(3)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check["name"] for check in self.checks if check["how"] == "FAIL"]


def wait() -> None:
    """Returns when the device has done all it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def normal(*shape: int) -> Tensor:
    """Normal numbers in bf16."""
    return torch.randn(shape, device=DEVICE).to(BF16)


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a function and the gradients of its inputs, for one random gradient of the results."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    random = torch.Generator(DEVICE).manual_seed(7)
    grads = [torch.randn(y.shape, device=DEVICE, generator=random).to(y.dtype) for y in results]
    torch.autograd.backward(results, grads)
    return [y.detach().float() for y in results] + [x.grad.float() for x in leaves if x.grad is not None]


def hold(ours: Function, torchs: Function, inputs: Sequence[Tensor]) -> str:
    """Asserts that our relative error against torch in fp32 is at most twice that of torch in bf16, and that two runs
    give the same bits; returns the errors."""
    true = outputs_and_gradients(torchs, [x.float() for x in inputs])
    known, found, again = (outputs_and_gradients(function, inputs) for function in (torchs, ours, ours))
    errors = []
    for number, (t, k, f, a) in enumerate(zip(true, known, found, again, strict=True)):
        size = float(t.norm()) + 1e-30
        error, usual = float((f - t).norm()) / size, float((k - t).norm()) / size
        assert torch.equal(f, a), f"result {number}: two runs differ"
        assert error <= 2 * usual + 2e-3, f"result {number}: relative error {error:.2e}, torch's own {usual:.2e}"
        errors.append(error)
    return "errors " + " ".join(f"{error:.1e}" for error in errors)


def both(function: Function, **options: Any) -> tuple[Function, Function]:
    """The function by Triton and by torch."""
    return lambda *x: function(*x, by="triton", **options), lambda *x: function(*x, by="torch", **options)


def check_rows(report: Report, rows: int) -> None:
    """The kernels that go over rows of the residual stream."""
    x, branch, weight, bias = normal(rows, HIDDEN), normal(rows, HIDDEN), normal(HIDDEN), normal(HIDDEN)
    cases: dict[str, tuple[Function, Function, list[Tensor]]] = {
        "rms_norm": (lambda a, w: norm.rms_norm(a, w, 1e-5, by="triton"),
                     lambda a, w: F.rms_norm(a, (HIDDEN,), w, 1e-5), [x, weight]),
        "add_rms_norm": (lambda a, b, w: norm.add_rms_norm(a, b, w, 1e-5, by="triton"),
                         lambda a, b, w: (F.rms_norm(a + b, (HIDDEN,), w, 1e-5), a + b), [x, branch, weight]),
        "layer_norm": (lambda a, w, b: norm.layer_norm(a, w, b, 1e-5, by="triton"),
                       lambda a, w, b: F.layer_norm(a, (HIDDEN,), w, b, 1e-5), [x, weight, bias]),
        "swiglu": (*both(activation.swiglu), [normal(rows, 2 * FFN)]),
        "bias_gelu": (*both(activation.bias_gelu), [x, bias]),
        "bias_dropout_add": (*both(dropout.bias_dropout_add, p=0.1, seed=1 << 40), [x, bias, branch]),
    }
    for name, (ours, torchs, inputs) in cases.items():
        report.check(f"{name}, {rows} rows", lambda ours=ours, torchs=torchs, inputs=inputs: hold(ours, torchs, inputs))


def text_of(options: dict[str, Any]) -> str:
    """How an attention differs from plain causal attention."""
    names = {"window": "window", "cumulative": "documents", "causal": "not causal"}
    return ", ".join(names[name] for name in options) or "causal"


def check_attention(report: Report) -> None:
    """RoPE, softmax and attention: causal, rectangular, with a window, with documents, and heads of other sizes."""
    heads, kv_heads = 8, 2
    for seq in (SEQ, 37):
        table = rope.rope_table(torch.arange(seq, device=DEVICE), HEAD, 1e4, BF16)
        ours, torchs = both(lambda x, by, table=table: rope.rope_split(x * 1, *table, heads, kv_heads, by=by))
        qkv = normal(2, seq, heads + 2 * kv_heads, HEAD)
        report.check(f"rope, {seq}", lambda ours=ours, torchs=torchs, qkv=qkv: hold(ours, torchs, [qkv]))
        ours, torchs = both(lambda x, by: softmax.scaled_masked_softmax(x, 0.1, causal=True, by=by))
        scores = normal(2, 4, seq, seq)
        report.check(f"softmax, {seq}", lambda ours=ours, torchs=torchs, scores=scores: hold(ours, torchs, [scores]))
    packed = torch.tensor([0, 5, SEQ // 3, SEQ + 7, 2 * SEQ], dtype=torch.int32, device=DEVICE)
    shapes: list[tuple[int, int, int, dict[str, Any]]] = [
        (HEAD, SEQ, SEQ, {}), (HEAD, 37, 37, {}), (HEAD, 21, 50, {}), (HEAD, SEQ, SEQ, {"window": SEQ // 4 + 3}),
        (HEAD, SEQ, SEQ, {"cumulative": packed}), (HEAD, SEQ, SEQ, {"causal": False})]
    shapes += [] if TINY else [(64, SEQ, SEQ, {}), (256, SEQ, SEQ, {})]
    for dim, seq, keys, options in shapes:
        # Views of one projection, as the model has them: their strides are not those of a plain tensor.
        q = normal(2, seq, heads, dim).transpose(1, 2)
        k, v = normal(2, keys, 2 * kv_heads, dim).transpose(1, 2).split([kv_heads, kv_heads], 1)

        def body(q: Tensor = q, k: Tensor = k, v: Tensor = v, options: dict[str, Any] = options) -> str:
            return hold(lambda *x: attention(*x, by="triton", **options),
                        lambda *x: attention(*x, by="reference", **options), [q, k, v])

        report.check(f"attention, heads of {dim}, {seq} x {keys}, {text_of(options)}", body)


def check_adamw() -> None:
    """AdamW by Triton against torch's fused kernel, with the clip scale and the skip on the device."""
    length = 12345 if TINY else (1 << 26) + 77
    state = [torch.randn(length, device=DEVICE) for _ in range(3)] + [torch.rand(length, device=DEVICE)]
    ours, torchs = ([x.clone() for x in state] for _ in range(2))
    weights = torch.empty(length, device=DEVICE, dtype=BF16)
    options: dict[str, Any] = {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    control = torch.tensor([0.5, 0.0], dtype=torch.float64, device=DEVICE)
    adamw.adamw_(*ours, out=weights, control=control, by="triton", **options)
    adamw.adamw_(*torchs, control=control, by="torch", **options)
    for name, one, other in zip(("master", "", "exp_avg", "exp_avg_sq"), ours, torchs, strict=True):
        assert not name or torch.allclose(one, other, rtol=1e-5, atol=1e-6), name
    assert TINY or torch.equal(weights, ours[0].to(BF16))  # the interpreter cuts bf16 off
    for by, buffers in (("triton", ours), ("torch", torchs)):
        before = [x.clone() for x in buffers]
        adamw.adamw_(*buffers, control=control.new_tensor([1.0, 1.0]), by=by, **options)
        assert all(torch.equal(buffers[i], before[i]) for i in (0, 2, 3)), f"{by}: a skipped step has written"


def check_squares() -> None:
    """The sum of squares against torch's norms."""
    parts = [torch.randn(length, device=DEVICE) for length in ((5, 9000) if TINY else (5, 123456789, 8192, 77))]
    ours, torchs = (float(gradient_norm.sum_of_squares(parts, by=by)) for by in ("triton", "torch"))
    assert abs(ours - torchs) < 1e-4 * torchs, (ours, torchs)


def check_wide_product() -> str:
    """The product of two bf16 matrices added into fp32, which carries every weight's gradient on a GPU."""
    if DEVICE.type != "cuda":
        return "on a GPU only"
    main, grad, x = torch.randn(HIDDEN, HIDDEN, device=DEVICE), normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN)
    wanted = main + grad.float().t() @ x.float()
    torch.addmm(main, grad.t(), x, out_dtype=main.dtype, beta=1, out=main)
    error = float((main - wanted).norm() / wanted.norm())
    assert error < 1e-3, error
    return f"error {error:.1e}"


def ops(report: Report) -> None:
    """Every kernel against torch."""
    for rows in (TOKENS,) if TINY else (TOKENS, 33):
        check_rows(report, rows)
    check_attention(report)
    labels = torch.randint(0, VOCAB, (TOKENS,), device=DEVICE)
    labels[::3] = -100
    report.check("cross_entropy", lambda: hold(
        lambda x: cross_entropy.cross_entropy(x * 1, labels, vocab=VOCAB, by="triton"),
        lambda x: F.cross_entropy(x.float(), labels, reduction="none", ignore_index=-100), [normal(TOKENS, VOCAB)]))
    report.check("adamw", check_adamw)
    report.check("gradient_norm", check_squares)
    report.check("bf16 product into fp32", check_wide_product)


@dataclass
class Training:
    """What some steps of training gave."""

    curve: list[tuple[float, float]]
    """(loss, gradient norm) of each step."""
    seconds: list[float]


def build(flags: str, kernels: Kernels) -> Engine:
    """An engine on this device."""
    engine = Engine(parse(flags.split()), Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), DEVICE, BF16, kernels)
    fill(engine)
    return engine


def batch_of(engine: Engine, number: int, sequences: int | None = None) -> Batch:
    """Random tokens."""
    config = engine.config
    size = (sequences or config.batch.global_batch, config.batch.seq_len + 1)
    rows = np.random.default_rng(number).integers(0, config.model.vocab_size, size)
    return Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), full=True)


def train(engine: Engine, steps: int) -> Training:
    """Trains some steps."""
    found = Training([], [])
    for number in range(steps):
        batch = batch_of(engine, number)
        wait()
        start = time.perf_counter()
        result = engine.train_step(batch)
        wait()
        found.seconds.append(time.perf_counter() - start)
        found.curve.append((result.loss, result.grad_norm))
    return found


def step(report: Report) -> None:
    """Three steps of a 7B-wide model of two layers: by Triton's kernels they are those by torch's, and repeat."""
    flags = f"{MODEL} --layers 2 --seq-len {SEQ} --micro-batch 1 --global-batch 2 --steps 100 --lr 1e-4"
    fused, plain = choose("triton", "triton", DEVICE, BF16), choose("torch", "sdpa", DEVICE, BF16)
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, more, kernels in (("torch", "", plain), ("triton", "", fused), ("triton again", "", fused),
                                ("triton, recompute", "--recompute full", fused),
                                ("triton, selective", "--recompute selective", fused),
                                ("triton, sdpa", "", replace(fused, attention="sdpa"))):
        def body(name: str = name, more: str = more, kernels: Kernels = kernels) -> str:
            found = train(build(f"{flags} {more}", kernels), COMPARED)
            curves[name] = found.curve
            gc.collect()
            return " ".join(f"loss {loss:.5f} norm {size:.4f}" for loss, size in found.curve)

        report.check(f"step by {name}", body)

    def compare() -> None:
        assert curves["triton"] == curves["triton again"], "the same run has other bits the second time"
        for name in ("triton, recompute", "triton, selective"):
            assert curves["triton"] == curves[name], f"{name}: what is made again has other bits: {curves}"
        for name in ("triton", "triton, sdpa"):
            for (loss, size), (known, usual) in zip(curves[name], curves["torch"], strict=True):
                assert abs(loss - known) < 5e-3 * known and abs(size - usual) < 3e-2 * usual, (name, curves)

    report.check("step by triton is that by torch, and repeats", compare)
    report.check("a checkpoint written beside steps",
                 lambda: check_save(build(f"{flags} --layers 1 --vocab-size 320", fused)))


def check_save(engine: Engine) -> str:
    """What is written while a step changes the state is the state as it was."""
    train(engine, 1)
    kept = [entry.tensor.clone() for entry in engine.optimizer.entries()]
    told: list[Saved] = []
    with tempfile.TemporaryDirectory() as folder:
        saver = BackgroundSave(Path(folder), rank=0, world=1, agree=alone, device=DEVICE, told=told.append)
        engine.rider = saver
        meta = {"samples": 0, "config": to_dict(engine.config), "world": {}, "optimizer_steps": 1}
        saver.save(1, engine.optimizer.entries(), meta=meta, assets={})
        train(engine, 1)
        saver.finish()
        entries = list(engine.optimizer.entries())
        open_checkpoint(told[0].folder).load(entries, expected=logical_shapes(engine.config.model))
    assert all(torch.equal(entry.tensor, tensor) for entry, tensor in zip(entries, kept, strict=True))
    return f"{told[0].seconds:.2f} s, training stood still {told[0].waited:.3f} s"


def full(report: Report, save: Path | None) -> None:
    """The 7B step: seconds, tokens/s, MFU, peak memory, and the kernels of one micro-batch."""
    fused = choose("triton", "triton", DEVICE, BF16) if TINY else choose("auto", "auto", DEVICE, BF16)
    for name, flags, kernels in (
            ("micro-batch 1", f"--micro-batch 1 --global-batch {MICRO_BATCHES}", fused),
            ("micro-batch 4, recompute", f"--micro-batch 4 --global-batch {max(4, MICRO_BATCHES)} --recompute", fused),
            ("micro-batch 1, SDPA", f"--micro-batch 1 --global-batch {MICRO_BATCHES}",
             replace(fused, attention="sdpa"))):
        def body(name: str = name, flags: str = flags, kernels: Kernels = kernels) -> str:
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            engine = build(f"{MODEL} --seq-len {SEQ} --steps 100 --lr 1e-4 {flags}", kernels)
            found = train(engine, TIMED)
            if name == "micro-batch 1" and DEVICE.type == "cuda":
                profile(engine, save)
            return speed(engine, found)

        report.check(f"7B step, {name}", body)


def speed(engine: Engine, found: Training) -> str:
    """Seconds of a step (the median), tokens/s, MFU where the device's peak is known, and peak memory."""
    config = engine.config
    seconds = sorted(found.seconds[1:])[len(found.seconds[1:]) // 2]
    tokens = config.batch.global_batch * config.batch.seq_len
    text = f"{seconds:.3f} s, {tokens / seconds:,.0f} tokens/s, loss {found.curve[-1][0]:.4f}"
    if DEVICE.type != "cuda":
        return text
    peak = peak_flops(torch.cuda.get_device_name(), BF16)
    mfu = f", MFU {tokens / seconds * flops_per_token(config.model, config.batch.seq_len) / peak:.1%}" if peak else ""
    return f"{text}{mfu}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def profile(engine: Engine, save: Path | None) -> None:
    """Prints the kernels of a step of one micro-batch by their time; the trace goes into `save`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        engine.train_step(batch_of(engine, 0, sequences=1))
        wait()
    for event in sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:30]:
        print(f"   {event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x {event.key[:100]}")
    if save is not None:
        with tempfile.TemporaryDirectory() as folder:
            found.export_chrome_trace(f"{folder}/trace.json")
            (save / "first_run_trace.json.gz").write_bytes(gzip.compress(Path(folder, "trace.json").read_bytes()))


def main() -> int:
    """Runs the parts that are named, or all of them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", choices=["ops", "step", "full", []], default=[])
    options.add_argument("--save", type=Path, nargs="?", const=RESULTS, metavar="DIR", help="folder for the results")
    options.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    given = options.parse_args()
    if not TINY and not torch.cuda.is_available():
        print("benchmarks/first_run.py needs a CUDA GPU; --tiny rehearses it on a CPU", file=sys.stderr)
        return 2
    if given.save is not None:
        given.save.mkdir(parents=True, exist_ok=True)
    report = Report()
    try:
        for part in given.parts or ["ops", "step", "full"]:
            body = {"ops": ops, "step": step, "full": lambda report: full(report, given.save)}[part]
            # What a part prepares between its checks may fail too, for want of memory: the next part runs all the same.
            report.check(f"{part} came to its end", partial(body, report))
    finally:
        if given.save is not None:
            keep("first_run", {"checks": report.checks, "machine": machine()}, given.save)
    print(f"failed: {', '.join(report.failed) or 'nothing'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
