"""The planner against the real thing: what it says a rank needs is what the engine's own modules allocate and keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Layout, RunConfig, check, parse
from engine.config.recompute import SELECTIVE, read_recompute
from engine.errors import UserError
from engine.kernels.dispatch import Kernels
from engine.mesh import AXES, Mesh
from engine.model import Decoder, Parts, stage_layers
from engine.parallel.buckets import GradientBuckets
from engine.parallel.collectives import TensorParallel
from engine.parallel.optimizer import ShardedAdamW
from engine.parallel.schedule import build_schedule
from engine.parallel.simulator import simulate
from engine.plan import (
    Capacity,
    balanced_stages,
    capacity_of,
    estimate,
    flops_of,
    flops_per_token,
    parameters,
    peak_flops,
    require_memory,
    with_recompute,
)
from engine.plan.capacity import CONTEXT, gpu_that_holds, main_memory, margin_text
from engine.plan.fit import states_at_least
from engine.plan.flops import layer_attention, layer_matrices
from engine.plan.trace import Live, Tracer

LLAMA = "--layers 3 --hidden 64 --ffn-hidden 160 --heads 4 --kv-heads 2 --vocab-size 251 --seq-len 96 --micro-batch 2"
GPT2 = f"--model gpt2 {LLAMA} --kv-heads 4"
SMALL = [LLAMA, f"{LLAMA} --tied", f"{LLAMA} --qk-norm", GPT2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def config_of(flags: str) -> RunConfig:
    return parse(flags.split())


def decoder(config: RunConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Decoder:
    model = Decoder(Parts(config.model, dtype=dtype, kernels=Kernels(attention=attention),
                          recompute=read_recompute(config.runtime.recompute)), range(config.model.layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model


def kept_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """Bytes that a real forward pass saves for its backward, parameters left out, with what goes in and comes out."""
    model = decoder(config, dtype)
    GradientBuckets(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(config.batch.micro_batch, config.batch.seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(tokens)
    return sum(storage.nbytes() for storage in kept.values()) + tokens.nbytes + y.nbytes


@pytest.mark.parametrize("flags", SMALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_gradients_and_optimizer_are_what_the_buckets_allocate(flags: str, dtype: torch.dtype) -> None:
    config = config_of(flags)
    buckets = GradientBuckets(decoder(config, dtype))
    optimizer = ShardedAdamW([buckets], config.optimizer, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)))
    memory = estimate(config, Layout(), dtype).heaviest.memory
    assert memory.weights == sum(bucket.data.nbytes for bucket in buckets.buckets)
    assert memory.gradients == sum(bucket.grads.nbytes for bucket in buckets.buckets)
    state = [t for m in optimizer.moments for t in (m.exp_avg, m.exp_avg_sq, *([m.master] if m.separate else []))]
    assert memory.optimizer == sum(tensor.nbytes for tensor in state)


@pytest.mark.parametrize("flags", [*SMALL, f"{LLAMA} --recompute selective", f"{GPT2} --recompute selective"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_what_a_real_forward_pass_keeps(flags: str, dtype: torch.dtype) -> None:
    config = config_of(flags)
    planned = estimate(config, Layout(), dtype).heaviest.memory.activations
    assert planned == pytest.approx(kept_bytes(config, dtype), rel=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "selective", "full:1", "full:3", "full:5", "full"])
@pytest.mark.parametrize("flags", [LLAMA, GPT2])
def test_the_worst_moment_of_a_real_pass_is_the_planned_one(
        flags: str, kind: str, dtype: torch.dtype) -> None:
    config = config_of(f"{flags} --layers 6 --recompute {kind}")
    model = decoder(config, dtype)
    buckets = GradientBuckets(model).buckets
    with Live([flat for bucket in buckets for flat in (bucket.data, bucket.grads)]) as memory:
        tokens = torch.zeros(config.batch.micro_batch, config.batch.seq_len, dtype=torch.long)
        y = model(tokens)
        kept = memory.live
        torch.autograd.backward(y, model.loss(y.detach(), tokens)[1])
    planned = estimate(config, Layout(), dtype).heaviest.memory
    assert planned.activations == pytest.approx(kept, rel=0.03)
    assert planned.activations + planned.working == pytest.approx(memory.peak, rel=0.05)


def test_plain_attention_is_planned_with_its_scores() -> None:
    fused, plain = (estimate(config_of(f"{LLAMA} --attention {name}"), Layout(), torch.float32).heaviest.memory
                    for name in ("sdpa", "reference"))
    assert plain.activations - fused.activations >= 3 * 2 * 4 * 96 * 96 * 4  # layers, batch, heads, scores, fp32


def test_recompute_keeps_one_input_a_layer() -> None:
    plans = [[estimate(config_of(f"{LLAMA} --layers {layers} {flag}"), Layout(), torch.float32).heaviest.memory
              for layers in (2, 3)] for flag in ("", "--recompute")]
    without, recompute = (three.activations - two.activations for two, three in plans)
    assert recompute == 2 * 96 * 64 * 4
    assert without > 5 * recompute
    assert plans[1][1].working > plans[0][1].working  # one layer comes back in the backward pass


def test_tensor_and_sequence_parallel_activations_shrink() -> None:
    def activations(flags: str, tp: int) -> int:
        config = config_of(f"{LLAMA} --vocab-size 256 --tp {tp} {flags}")
        return estimate(config, check(config, tp), torch.float32).heaviest.memory.activations

    whole, split, sequence = activations("", 1), activations("", 2), activations("--sequence-parallel", 2)
    assert whole / 2 < sequence < split < whole
    # With it all is split but ids, rotary table and norm statistics, which are small.
    assert sequence == pytest.approx(whole / 2, rel=0.06)


@pytest.mark.parametrize("layout", [Layout(pp=2, tp=2), Layout(dp=2), Layout(pp=3, dp=4), Layout(tp=4)])
@pytest.mark.parametrize("flags", SMALL)
def test_every_stage_holds_what_its_own_modules_hold(layout: Layout, flags: str) -> None:
    config = config_of(f"{flags} --global-batch 24 --tp {layout.tp} --pp {layout.pp}")
    plan = estimate(config, layout, torch.bfloat16)
    spans = balanced_stages(config, layout.pp)
    for stage, layers in zip(plan.stages, spans, strict=True):
        model = Decoder(Parts(config.model, TensorParallel(None, 0, layout.tp)), layers, first=stage.rank == 0,
                        last=stage.rank == layout.pp - 1)
        count = sum(parameter.numel() for parameter in model.parameters())
        shard = stage.memory.optimizer // 12
        assert (stage.layers, stage.parameters) == (len(layers), count)
        assert stage.memory.weights >= 2 * count  # the buckets' padding to whole rows a dp rank
        assert count <= shard * layout.dp <= 1.05 * count
        assert stage.memory.gradients == 2 * stage.memory.weights + (4 * shard if layout.dp > 1 else 0)
        assert stage.in_flight == min(plan.micro_batches, layout.pp - stage.rank)


@pytest.mark.parametrize(("layers", "stages", "head", "wanted"), [
    (32, 1, 2.4, [32]), (32, 4, 0.0, [8, 8, 8, 8]), (32, 4, 2.4, [9, 9, 8, 6]), (32, 8, 2.4, [5, 5, 4, 4, 4, 4, 4, 2]),
    (5, 2, 0.1, [3, 2]), (5, 4, 0.1, [2, 1, 1, 1]), (4, 4, 9.0, [1, 1, 1, 1]), (6, 4, 9.0, [2, 2, 1, 1])])
def test_stages_weigh_the_head(
        layers: int, stages: int, head: float, wanted: list[int]) -> None:
    spans = stage_layers(layers, stages, head)
    assert [len(span) for span in spans] == wanted
    assert [layer for span in spans for layer in span] == list(range(layers))


@given(st.integers(1, 9), st.integers(0, 30), st.floats(0, 20))
def test_no_stages_are_lighter(stages: int, more: int, head: float) -> None:
    """Against every number of layers of the last stage, the others being as equal as can be."""
    layers = stages + more
    sizes = [len(span) for span in stage_layers(layers, stages, head)]
    assert min(sizes) >= 1
    if stages > 1:
        assert max(*sizes[:-1], sizes[-1] + head) <= min(
            max(last + head, -(-(layers - last) // (stages - 1))) for last in range(1, layers - stages + 2))


@pytest.mark.parametrize(("pp", "most"), [(4, 0.89), (8, 0.81)])
def test_a_step_of_an_8b_model_takes_so_much_of_one_with_equal_stages(pp: int, most: float) -> None:
    """By FLOPs, 64 micro-batches."""
    config = config_of("--layers 32 --hidden 4096 --ffn-hidden 14336 --heads 32 --kv-heads 8 --vocab-size 128256 "
                       f"--seq-len 4096 --micro-batch 1 --global-batch 64 --pp {pp}")
    schedule = build_schedule("1f1b", pp, 1, 64)
    model = config.model
    layer = 2.0 * layer_matrices(model) + layer_attention(model, 4096)

    def seconds(spans: list[range]) -> float:
        times = [len(span) * layer for span in spans]
        times[-1] += 2.0 * model.vocab_size * model.hidden
        return simulate(schedule, times, [2.0 * time for time in times]).makespan

    assert seconds(balanced_stages(config, pp)) / seconds(stage_layers(32, pp)) < most


def test_bubble_and_accumulation_are_those_of_the_schedule() -> None:
    config = config_of("--model 7b --layers 64 --vocab-size 64 --pp 4 --global-batch 48 --micro-batch 2")
    plan = estimate(config, check(config, 8), torch.bfloat16)
    assert (plan.micro_batches, plan.tokens_per_step) == (12, 48 * 256)
    assert plan.bubble == pytest.approx(3 / 15, abs=1e-3)  # (p - 1) / (m + p - 1), equal stages


def test_interleaving_counts_every_chunk() -> None:
    config = config_of(f"{LLAMA} --layers 8 --pp 2 --virtual-stages 2 --schedule interleaved --global-batch 16")
    plan = estimate(config, check(config, 2), torch.float32)
    assert [stage.layers for stage in plan.stages] == [4, 4]
    assert plan.stages[0].in_flight > plan.stages[1].in_flight > 1


def test_a_7b_model_in_bf16_is_18_bytes_a_parameter() -> None:
    config = config_of("--model 7b --seq-len 4096 --recompute --global-batch 64")
    plan = estimate(config, Layout(), torch.bfloat16)
    memory = plan.heaviest.memory
    assert plan.parameters == 6_738_415_616  # Llama 2 7B
    assert memory.weights + memory.gradients + memory.optimizer == 18 * plan.parameters
    require_memory(plan, Capacity("one GPU", 141 * 10**9, gpu=True))


@pytest.mark.parametrize("flags", SMALL)
def test_parameters_are_those_of_the_model(flags: str) -> None:
    config = config_of(f"{flags} --vocab-size 256")  # no padding rows
    assert parameters(config.model) == sum(p.numel() for p in decoder(config).parameters())
    assert parameters(replace(config.model, vocab_size=251)) == parameters(config.model) - 5 * 64 * (
        1 if config.model.tied else 2)


@pytest.mark.parametrize("flags", [LLAMA, GPT2])
def test_flops_are_those_torch_counts(flags: str) -> None:
    config = config_of(f"{flags} --vocab-size 256")
    model, batch = decoder(config, attention="reference"), config.batch
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(batch.micro_batch, batch.seq_len, dtype=torch.long)))
    # The plain attention computes the upper triangle too, which is not counted as useful.
    causal = config.model.layers * 2 * config.model.heads * config.model.head_dim * batch.seq_len
    counted = counter.get_total_flops() / (batch.micro_batch * batch.seq_len)
    assert 3 * (counted - causal) == flops_per_token(config.model, batch.seq_len)


def test_flops_of_sequences_of_any_lengths() -> None:
    model = config_of("--model 7b").model
    lengths = [17, 300, 4096]
    each = sum(n * flops_per_token(model, n) for n in lengths)
    assert flops_of(model, sum(lengths), sum(n * n for n in lengths)) == pytest.approx(each, rel=1e-12)


def test_flops_of_7b() -> None:
    model = config_of("--model 7b").model
    assert flops_per_token(model, 4096) == pytest.approx(6 * 6.607e9 + 6 * 32 * 4096 * 4096, rel=1e-3)


@pytest.mark.parametrize(("name", "dtype", "tera"), [
    ("NVIDIA H200", torch.bfloat16, 989.4), ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
    ("NVIDIA H100 PCIe", torch.bfloat16, 756.0), ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
    ("NVIDIA L40S", torch.bfloat16, 362.0), ("NVIDIA L4", torch.bfloat16, 121.0),
    ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2), ("NVIDIA H20", torch.bfloat16, 148.0),
    ("NVIDIA RTX A6000", torch.bfloat16, 154.8),
])
def test_known_gpus_have_a_peak(name: str, dtype: torch.dtype, tera: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(tera * 1e12)


def test_unknown_devices_have_no_peak() -> None:
    assert peak_flops("cpu", torch.float32) is None
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None


def test_what_does_not_fit_is_said_in_plain_words() -> None:
    config = config_of("--model 7b --seq-len 4096 --recompute --global-batch 1024")
    plan = estimate(config, Layout(), torch.bfloat16)
    with pytest.raises(UserError) as error:
        require_memory(plan, Capacity("this machine", 16 * 10**9))
    text = str(error.value)
    for part in ("7b in bfloat16 needs 12", "this machine has 16.0 GB", "weights 13.5 GB + gradients 27.0 GB",
                 "one GPU of 141 GB", "16 devices like this one (with --tp 8 and dp 2:",
                 "bash examples/pretrain_tiny.sh"):
        assert part in text
    assert len(text.splitlines()) == 1


def test_the_proposed_layout_fits_and_recompute_is_proposed_first() -> None:
    config = config_of("--model 1b --seq-len 2048 --global-batch 64 --micro-batch 8")
    plan = estimate(config, Layout(), torch.bfloat16)
    recompute = estimate(with_recompute(config, SELECTIVE), Layout(), torch.bfloat16)
    available = (plan.heaviest.memory.total + recompute.heaviest.memory.total) // 2
    with pytest.raises(UserError, match=r"this one device \(with --recompute selective: "):
        require_memory(plan, Capacity("this GPU", available))


def test_the_copy_that_checkpoints_are_written_from_is_planned() -> None:
    config = config_of("--model 1b --seq-len 2048 --out run --save-every 100")
    plan = estimate(config, Layout(), torch.bfloat16)
    assert plan.copied == 14 * plan.parameters and "saving" in plan.report()
    assert estimate(config_of("--model 1b --global-batch 64 --out run --save-every 100"), Layout(dp=2),
                    torch.bfloat16).copied == 7 * plan.parameters
    for waits in ("--out run --save-every 100 --save-wait", "--out run", "--save-every 100"):
        other = estimate(config_of(f"--model 1b --seq-len 2048 {waits}"), Layout(), torch.bfloat16)
        assert other.copied == 0 and "saving" not in other.report()
    need = plan.heaviest.memory.total
    for sound in (Capacity("this machine", need + plan.copied), Capacity("each GPU", 2 * need, gpu=True),
                  Capacity("each GPU", 2 * need, gpu=True, main=plan.copied)):
        require_memory(plan, sound)
    for short in (Capacity("this machine", need + plan.copied - 1),
                  Capacity("each GPU", 2 * need, gpu=True, main=plan.copied - 1)):
        with pytest.raises(UserError, match="Add --save-wait, which takes no copy"):
            require_memory(plan, short)


def test_a_stage_that_does_not_fit_is_named() -> None:
    config = config_of("--model 7b --pp 4 --tp 2 --seq-len 4096 --global-batch 64")
    plan = estimate(config, check(config, 8), torch.bfloat16)
    with pytest.raises(UserError, match=r"the fullest of 8 processes \(pp4 dp1 tp2, stage 0\); each GPU has 10.0 GB"):
        require_memory(plan, Capacity("each GPU", 10 * 10**9))


def test_no_layout_is_proposed_where_none_holds_it() -> None:
    plan = estimate(config_of("--model 70b --seq-len 4096"), Layout(), torch.bfloat16)
    with pytest.raises(UserError, match="No layout of up to 1024 such devices holds it"):
        require_memory(plan, Capacity("this machine", 10**8))


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=4), Layout(pp=2, tp=2), Layout(pp=2, dp=2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_that_spares_layouts_never_spares_one_that_fits(layout: Layout, dtype: torch.dtype) -> None:
    config = config_of(f"{LLAMA} --global-batch 8 --tp {layout.tp} --pp {layout.pp}")
    plan = estimate(config, layout, dtype)
    memory = max(s.memory.weights + s.memory.gradients + s.memory.optimizer for s in plan.stages)
    assert 0.5 * memory <= states_at_least(plan.parameters, dtype, layout) <= memory


def test_the_report_of_a_70b_model_on_64_gpus_costs_a_few_traces() -> None:
    config = config_of("--model 70b --tp 8 --pp 8 --seq-len 4096 --global-batch 64 --sequence-parallel")
    tracer = Tracer()
    lines = estimate(config, check(config, 64), torch.bfloat16, tracer).report().splitlines()
    assert "pp8 dp1 tp8 · 64 processes · 1f1b" in lines[0]
    assert "69.0 B parameters, bfloat16" in lines[1]
    assert len(lines) == 5 + 2 + 8 and len({len(line) for line in lines[6:]}) == 1  # aligned
    assert len(tracer.seen) == 12  # one and two layers of a first, middle and last stage, at two widths


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_main_memory_is_what_the_smallest_limit_leaves(tmp_path: Path) -> None:
    write(tmp_path / "proc", meminfo="MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert main_memory(tmp_path) == 4000 * 1024
    write(tmp_path / "proc/self", cgroup="0::/box/inner\n")
    group = tmp_path / "sys/fs/cgroup"
    write(group / "box", memory__max="3000000\n", memory__current="2500000\n", memory__stat="inactive_file 500000\n")
    write(group / "box/inner", memory__max="max\n", memory__current="1\n", memory__stat="inactive_file 0\n")
    assert main_memory(tmp_path) == 1_000_000


def test_main_memory_knows_the_first_kind_of_cgroup(tmp_path: Path) -> None:
    write(tmp_path / "proc", meminfo="MemAvailable:    4000 kB\n")
    write(tmp_path / "proc/self", cgroup="5:cpu,memory:/box\n3:pids:/box\n")
    write(tmp_path / "sys/fs/cgroup/memory", memory__limit_in_bytes="2000000", memory__usage_in_bytes="1500000",
          memory__stat="total_inactive_file 0\n")
    assert main_memory(tmp_path) == 500_000


def test_local_ranks_share_the_main_memory() -> None:
    cpu = torch.device("cpu")
    assert 0 < capacity_of(cpu, 4).total < capacity_of(cpu, 1).total
    assert capacity_of(cpu, 4).what == "this machine, shared by 4 processes,"


def test_a_gpu_is_never_planned_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's context, NCCL's buffers and what the allocator cannot give are kept free, and said."""
    plan = estimate(config_of(LLAMA), Layout(), torch.float32)
    need = plan.heaviest.memory.total
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=need + 10**6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Some")
    full = capacity_of(torch.device("cuda", 0), 1)
    with pytest.raises(UserError, match=r"each GPU \(NVIDIA Some\) has .* of it for the run \(kept free: 800.0 MB "
                                        r"for the CUDA context, 2% for fragmentation\)"):
        require_memory(plan, full)
    require_memory(plan, replace(full, gpu=False))


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(tp=8, dp=4), Layout(pp=2), Layout(pp=4, tp=8, dp=2)])
def test_a_gpu_that_holds_a_rank_is_no_larger_than_it_must_be(layout: Layout) -> None:
    size = gpu_that_holds(50 * 10**9, layout)
    assert 0 <= Capacity("", size, gpu=True).usable(layout) - 50 * 10**9 <= 1
    assert ("NCCL" in margin_text(layout)) == (layout.world > 1)
    assert size > 50 * 10**9 + CONTEXT


def test_more_groups_of_ranks_leave_less_of_a_gpu() -> None:
    layouts = [Layout(), Layout(dp=2), Layout(dp=2, tp=2), Layout(dp=2, tp=2, pp=2), Layout(dp=2, tp=2, pp=4)]
    usable = [Capacity("", 80 * 10**9, gpu=True).usable(layout) for layout in layouts]
    assert usable == sorted(set(usable), reverse=True)
