"""Every layout computes the same run: losses, gradient norms, first gradients and weights equal one process's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import verify
from engine.train.engine import Engine

sys.path.insert(0, str(Path(__file__).parent))
import toys

STEPS = 8
"""The warm-up ends with the third; each step adds what the one before it got wrong."""
MICRO4 = "--micro-batch 4"  # a layout without stages or dp needs no micro-batches; fewer messages, same run
LAYOUTS = {
    "tp2": (2, f"--tp 2 {MICRO4}"), "pp2": (2, "--pp 2"), "dp2": (2, ""), "tp2-pp2": (4, "--tp 2 --pp 2"),
    "tp2-dp2": (4, "--tp 2 --micro-batch 2"), "pp2-dp2": (4, "--pp 2"), "pp4": (4, "--pp 4"),
    "tp4": (4, f"--tp 4 {MICRO4}"), "tp2-pp2-dp2": (8, "--tp 2 --pp 2"),
    "tp2-sp": (2, f"--tp 2 --sequence-parallel {MICRO4}"), "tp4-sp": (4, f"--tp 4 --sequence-parallel {MICRO4}"),
    "tp2-pp2-sp": (4, "--tp 2 --pp 2 --sequence-parallel"),
    "tp2-dp2-sp": (4, "--tp 2 --sequence-parallel --micro-batch 2"),
    "tp2-pp2-dp2-sp": (8, "--tp 2 --pp 2 --sequence-parallel"),
    "pp2-interleaved": (2, "--pp 2 --virtual-stages 2 --schedule interleaved"), "recompute": (1, "--recompute"),
    "interleaved": (1, "--virtual-stages 2 --schedule interleaved"),
    "tp2-sp-recompute": (2, f"--tp 2 --sequence-parallel --recompute {MICRO4}"), "dp4": (4, ""),
    "tp2-sp-selective": (2, f"--tp 2 --sequence-parallel --recompute selective {MICRO4}"),
    "tp2-pp2-full1": (4, "--tp 2 --pp 2 --recompute full:1"),
}
# Every layout trains a llama (no biases, embeddings not tied) and a gpt2 (biases everywhere, tied embeddings). The two
# between them train where a layout treats what is theirs in a way of its own.
PAIRS = [(model, layout) for model in ("llama", "gpt2") for layout in LAYOUTS]
PAIRS += [("llama-tied", layout) for layout in ("tp2", "pp2", "dp2", "tp4-sp", "pp2-interleaved", "tp2-pp2-dp2-sp")]
PAIRS += [("qwen3", layout) for layout in ("tp2", "tp4", "tp2-sp-recompute", "tp4-sp", "tp2-pp2-sp")]

BY_TORCH = [("llama", "tp4-sp"), ("llama", "pp2-interleaved"), ("llama-tied", "tp2-pp2-dp2-sp"), ("gpt2", "dp2"),
            ("qwen3", "tp2-sp-recompute")]
"""What `make test` trains over torch.distributed too; `make soak` trains the rest."""


def run(rank: int, world: int, flags: str, steps: int, shared: bool = True) -> Any:
    """On a rank: trains, and returns the curve, the gradients of step 1 and the initial and final weights. `shared`:
    through shared memory, else through torch.distributed."""
    config = toys.make_config(flags)
    mesh = toys.make_mesh(config, rank, world, shared=shared)
    assert world == 1 or mesh.transport == ("shared memory" if shared else "gloo")
    return run_engine(toys.make_engine(config, rank, world, mesh), steps)


def run_engine(engine: Engine, steps: int) -> Any:
    """The same for an engine at its first step."""
    initial = toys.local_weights(engine)
    engine.optimizer.config = _no_clip(engine.optimizer.config)  # a clipped shard would not be the gradient
    first = toys.train(engine, 1)
    gradients = toys.local_gradients(engine)
    engine.optimizer.config = engine.config.optimizer
    curve = first + toys.train(engine, steps - 1)
    return curve, gradients, initial, toys.local_weights(engine)


def _no_clip(config: Any) -> Any:
    from dataclasses import replace

    return replace(config, clip=0.0)


@pytest.fixture(scope="module")
def single(ranks: Any) -> Any:
    """The run of one process, computed once a model."""
    known: dict[str, Any] = {}

    def get(flags: str) -> Any:
        if flags not in known:
            known[flags] = ranks(1, run, flags=flags, steps=STEPS)[0]
        return known[flags]

    return get


def gradient_errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """||d|| / max(||g||, 1e-6 of the whole norm) of each tensor."""
    sides = ({name: torch.from_numpy(g) for name, g in side.items()} for side in (found, wanted))
    return verify.gradient_errors(*sides)


def compare(results: list[Any], reference: Any, bound: float, gradient_bound: float) -> None:
    """Asserts equality of a layout's results (by rank) with one process's."""
    curve, gradients, initial, final = reference
    for other, *_ in results:
        assert other == results[0][0], "ranks report different losses"
    np.testing.assert_allclose(results[0][0], curve, rtol=bound, atol=0)
    errors = gradient_errors(toys.assemble([p for r in results for p in r[1]]), toys.assemble(gradients))
    assert max(errors.values()) <= gradient_bound, {n: e for n, e in errors.items() if e > gradient_bound}
    first, wanted = toys.assemble([p for r in results for p in r[2]]), toys.assemble(initial)
    assert first.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (first[name] == tensor).all(), f"{name} starts from other bits"
    last = toys.assemble([p for r in results for p in r[3]])
    assert last.keys() == toys.assemble(final).keys()


@pytest.mark.parametrize(("model", "layout"), [
    pytest.param(*pair, marks=() if pair[0] == "llama" else pytest.mark.slow) for pair in PAIRS])
def test_fp64_equals_one_process(ranks: Any, single: Any, model: str, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    reference = single(toys.MODELS[model])
    compare(ranks(world, run, flags=f"{toys.MODELS[model]} {flags}", steps=STEPS), reference, 1e-10, 1e-10)


@pytest.mark.parametrize(("model", "layout"), [
    pytest.param(*pair, marks=pytest.mark.slow if pair in BY_TORCH else pytest.mark.soak)
    for pair in PAIRS if LAYOUTS[pair[1]][0] > 1])
def test_fp64_equals_one_process_over_torch_distributed(ranks: Any, single: Any, model: str, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    reference = single(toys.MODELS[model])
    found = ranks(world, run, flags=f"{toys.MODELS[model]} {flags}", steps=STEPS, shared=False)
    compare(found, reference, 1e-10, 1e-10)


@pytest.mark.parametrize("layout", ["pp2", "dp2", "tp2-pp2-dp2-sp"])
def test_attention_within_documents_equals_one_process(ranks: Any, single: Any, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    base = f"{toys.MODELS['llama']} --mask-documents --micro-batch 2 --global-batch 8"
    compare(ranks(world, run, flags=f"{base} {flags}", steps=STEPS), single(base), 1e-10, 1e-10)
    assert single(base)[0] != single(base.replace("--mask-documents ", ""))[0]


@pytest.mark.parametrize(("model", "layout"), [("llama", "tp2"), ("llama", "dp2"), ("llama", "tp2-pp2-dp2-sp"),
                                               ("gpt2", "pp2"), ("gpt2", "tp4-sp"), ("gpt2", "tp2-pp2-dp2-sp")])
def test_fp32_equals_one_process(ranks: Any, single: Any, model: str, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    base = f"{toys.MODELS[model]} --dtype fp32 --lr 1e-3"
    results = ranks(world, run, flags=f"{base} {flags}", steps=STEPS)
    reference = single(base)
    np.testing.assert_allclose([loss for loss, _ in results[0][0]], [loss for loss, _ in reference[0]], rtol=1e-5)
    errors = gradient_errors(toys.assemble([p for r in results for p in r[1]]), toys.assemble(reference[1]))
    # Softmax does not see a shift of all keys, so a key bias has gradient zero: its fp32 value is rounding alone.
    errors = {name: error for name, error in errors.items() if not name.endswith("k_proj.bias")}
    assert max(errors.values()) <= 5e-6, {n: e for n, e in errors.items() if e > 5e-6}


@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "dp2", "tp2-pp2-dp2"])
def test_the_same_layout_twice_is_bit_equal(ranks: Any, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    line = f"{toys.MODELS['llama-tied']} --dtype fp32 {flags}"
    first, second = (ranks(world, run, flags=line, steps=6) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a[0] == b[0]
        for (name, _, _, x), (_, _, _, y) in zip(a[3], b[3], strict=True):
            assert (x == y).all(), name


def test_shards_of_a_layer_differ(ranks: Any) -> None:
    results = ranks(2, run, flags=f"{toys.MODELS['llama']} --tp 2", steps=1)
    held: dict[str, list[np.ndarray]] = {}
    for result in results:
        for name, shape, _, values in result[2]:
            if len(shape) == 2:
                held.setdefault(name, []).append(values)
    assert held
    for name, parts in held.items():
        if parts[0].shape == parts[1].shape:
            assert not (parts[0] == parts[1]).any(), f"{name}: the shards are copies"


def test_padding_stays_zero(ranks: Any) -> None:
    for padding in ranks(2, run_padding, flags=f"{toys.MODELS['llama-tied']} --tp 2"):
        assert padding == 0.0


def run_padding(rank: int, world: int, flags: str) -> float:
    """On a rank: the largest number in any padded row after some steps."""
    engine = toys.make_engine(toys.make_config(flags), rank, world)
    toys.train(engine, 3)
    worst = 0.0
    for bucket in engine.optimizer.buckets:
        keep = bucket.shard_data.clone()
        for _, span in bucket.shard_pieces():
            keep[span] = 0
        worst = max(worst, float(keep.abs().max()))
    return worst


def test_sequence_length_may_change_between_steps(ranks: Any) -> None:
    curves = [ranks(world, run_lengths, flags=f"{toys.MODELS['llama']} {flags}")[0]
              for world, flags in ((1, ""), (4, "--tp 2 --pp 2 --sequence-parallel"))]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-10)


def run_lengths(rank: int, world: int, flags: str) -> list[float]:
    """On a rank: steps of lengths 16, 7 (which tp does not divide: padded with ignored labels), 12."""
    from engine.data.batches import Batch

    engine = toys.make_engine(toys.make_config(flags), rank, world)
    losses = []
    for length in (16, 7, 12):
        batch = toys.make_batch(engine.config, engine.step, engine.mesh.dp, engine.mesh.size("dp"))
        losses.append(engine.train_step(Batch(batch.tokens[:, :length], batch.labels[:, :length])).loss)
    return losses


def test_counted_tokens_leave_padding_out_and_are_the_same_for_every_layout(ranks: Any) -> None:
    counts = [ranks(world, run_padded, flags=f"{toys.MODELS['llama']} {flags}")
              for world, flags in ((1, ""), (2, ""), (4, "--tp 2 --pp 2 --sequence-parallel"))]
    lengths = [5 + n for n in range(4)]
    wanted = (sum(lengths), sum(n - 2 for n in lengths), sum(n * n for n in lengths))
    assert [tuple(count) for world in counts for count in world] == [wanted] * 7


def run_padded(rank: int, world: int, flags: str) -> list[int]:
    """On a rank: what a step counts when row n has 5 + n tokens, the first two not learned, and padding up to 15."""
    import numpy as np

    from engine.data.batches import Batch, share_of

    engine = toys.make_engine(toys.make_config(flags), rank, world)
    whole = toys.make_batch(engine.config, 0, 0, 1)
    lengths = 5 + np.arange(len(whole.tokens))
    labels = whole.tokens[:, 1:16].copy()
    for row, length in zip(labels, lengths, strict=True):
        row[:2], row[length:] = -100, -100
    batch = Batch(whole.tokens[:, :15], labels, lengths=lengths)
    result = engine.train_step(share_of(batch, engine.mesh.dp, engine.mesh.size("dp")))
    return [result.tokens, result.supervised, result.squares]


def test_evaluation_is_the_same(ranks: Any) -> None:
    values = [ranks(world, run_evaluation, flags=f"{toys.MODELS['llama']} {flags}")[0]
              for world, flags in ((1, ""), (4, "--tp 2 --pp 2"), (4, "--pp 2"))]
    np.testing.assert_allclose(values[1:], values[0], rtol=1e-10)


def run_evaluation(rank: int, world: int, flags: str) -> float:
    """On a rank: the held-back loss over 7 sequences, which dp 2 does not divide."""
    from engine.data.batches import Batch, share_of

    engine = toys.make_engine(toys.make_config(flags), rank, world)
    whole = toys.make_batch(engine.config, 99, 0, 1)
    held = share_of(Batch(whole.tokens[:7], whole.labels[:7]), engine.mesh.dp, engine.mesh.size("dp"))
    return engine.evaluate([held])


def test_a_loss_that_is_not_finite_moves_nothing(ranks: Any) -> None:
    assert all(ranks(2, run_nan, flags=f"{toys.MODELS['llama']} --tp 2"))


def run_nan(rank: int, world: int, flags: str) -> bool:
    """On a rank: whether weights and optimizer are untouched by a step whose loss is NaN."""
    import torch

    engine = toys.make_engine(toys.make_config(flags), rank, world)
    toys.train(engine, 2)
    with torch.no_grad():
        engine.chunks[0].model.norm.weight[0] = float("nan")
    before = [b.data.clone() for b in engine.optimizer.buckets] + [m.exp_avg.clone() for m in engine.optimizer.moments]
    batch = toys.make_batch(engine.config, engine.step, 0, 1)
    result = engine.train_step(batch)
    after = [b.data for b in engine.optimizer.buckets] + [m.exp_avg for m in engine.optimizer.moments]
    same = all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(before, after, strict=True))
    return not result.finite and same and engine.optimizer.steps == 2
