"""The engine on Triton's kernels computes the run that it computes on PyTorch's, and compiles without a break."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from engine import verify
from engine.config import Layout, check
from engine.config.recompute import FULL, NONE, SELECTIVE
from engine.kernels.dispatch import Kernels, choose
from engine.kernels.rope import rope_table
from engine.mesh import AXES, Mesh, build_mesh
from engine.model import Parts
from engine.model.decoder import Block
from engine.parallel.layers import embed
from engine.parallel.micro_batch import MicroBatch
from engine.plan import estimate
from engine.train.engine import Engine
from tests.kernels.rule import DEVICE, needs_triton, normal
from tests.parallel import test_recompute, toys

pytestmark = needs_triton
FUSED = replace(choose("torch", "sdpa", torch.device("cpu"), torch.float32), norm="triton", rope="triton",
                activation="triton", loss="triton", optimizer="triton", attention="triton")
STEPS = 2
FP32 = "--dtype fp32 --lr 1e-3 --layers 2 --seq-len 12 --global-batch 2"
MODELS = {"llama": toys.MODELS["llama"], "documents, tied": f"{toys.MODELS['llama-tied']} --mask-documents",
          "qwen3": toys.MODELS["qwen3"], "gpt2": toys.MODELS["gpt2"]}


def trace(flags: str, kernels: Kernels, mesh: Mesh) -> verify.Trace:
    return verify.trace(toys.make_config(f"{flags} --steps {STEPS}"), mesh, DEVICE, torch.float32, kernels)


@cache
def alone(flags: str, kernels: Kernels) -> verify.Trace:
    """The run of one process, computed once."""
    return trace(flags, kernels, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_run_on_triton_is_the_run_on_torch(model: str) -> None:
    flags = f"{MODELS[model]} {FP32}"
    found, wanted = alone(flags, FUSED), alone(flags, Kernels())
    np.testing.assert_allclose(found.curve, wanted.curve, rtol=1e-5)
    errors = verify.gradient_errors(found.gradients, wanted.gradients)
    errors = {name: error for name, error in errors.items() if not name.endswith("k_proj.bias")}  # its truth is zero
    assert max(errors.values()) <= 5e-6, errors


@pytest.mark.slow
def test_recomputation_gives_the_same_bits() -> None:
    flags = f"{toys.MODELS['qwen3']} {FP32.replace('fp32', 'bf16')} --global-batch 1"
    kept, again = (test_recompute.alone(f"{flags} --recompute {kind}", FUSED, steps=1) for kind in ("none", "full:1"))
    test_recompute.assert_same_bits(again, kept)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_made_again_has_the_same_bits(family: str, first: bool) -> None:
    """In bf16: the gradients of a block's input are added in fp32 and rounded once, whoever made that input."""
    config = toys.make_config(f"{toys.MODELS[family]} {FP32}").model
    micro = MicroBatch.of(torch.zeros(2, 12, dtype=torch.long, device=DEVICE))
    rope = None if family == "gpt2" else rope_table(micro.positions, 8, 1e4, torch.bfloat16)
    results = []
    for recompute in (NONE, SELECTIVE, FULL):
        block = Block(0, Parts(config, dtype=torch.bfloat16, device=DEVICE, kernels=FUSED, recompute=recompute))
        for i, parameter in enumerate(block.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=i, scale=0.1))
        x, branch = (normal(2, 12, 32, seed=seed).bfloat16().requires_grad_() for seed in (50, 51))
        outs = block(x, None if first else branch, micro, rope)
        torch.autograd.backward(outs, [normal(*y.shape, seed=60 + i).bfloat16() for i, y in enumerate(outs)])
        results.append([*outs, x.grad, *([] if first else [branch.grad]), *(p.grad for p in block.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def tp2(rank: int, world: int, flags: str) -> Any:
    """A rank of a tensor-parallel run on Triton's kernels."""
    config = toys.make_config(flags)
    found = trace(flags, FUSED, build_mesh(check(config, world), rank, config.model.kv_heads,
                                     timedelta(seconds=60)))
    return found.curve, {name: tensor.numpy() for name, tensor in found.gradients.items()}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the ranks of this test share no GPU")
@pytest.mark.parametrize("layout", ["--tp 2", "--tp 2 --sequence-parallel"])
def test_tensor_parallel_triton_equals_one_process(ranks: Any, layout: str) -> None:
    flags = f"{toys.MODELS['llama']} {FP32}"
    (curve, gradients), (other, _) = ranks(2, tp2, flags=f"{flags} {layout}")
    wanted = alone(flags, FUSED)
    assert curve == other, "ranks report different losses"
    np.testing.assert_allclose(curve, wanted.curve, rtol=1e-5)
    errors = verify.gradient_errors({name: torch.from_numpy(g) for name, g in gradients.items()}, wanted.gradients)
    assert max(errors.values()) <= 5e-6, errors


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_block_compiles_to_one_graph(family: str) -> None:
    config = toys.make_config(f"{toys.MODELS[family]} {FP32}").model
    block = Block(0, Parts(config, device=DEVICE, kernels=FUSED))
    for i, parameter in enumerate(block.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=i, scale=0.1))
    micro = MicroBatch.of(torch.zeros(2, 12, dtype=torch.long, device=DEVICE))
    rope = None if family == "gpt2" else rope_table(micro.positions, 8, 1e4, torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        block.zero_grad()
        x, branch = (normal(2, 12, 32, seed=seed).float().requires_grad_() for seed in (50, 51))
        outs = run(x, branch, micro, rope)
        sum((y * normal(*y.shape, seed=60).float()).sum() for y in outs).backward()
        results.append([*outs, x.grad, branch.grad, *(p.grad for p in block.parameters())])
    for plain, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what is kept is counted on a CPU")
@pytest.mark.parametrize("kind", ["none", "selective"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt2"])
def test_the_plan_knows_what_the_kernels_keep(model: str, kind: str) -> None:
    config = toys.make_config(f"{toys.MODELS[model]} --dtype fp32 --layers 2 --seq-len 48 --recompute {kind}")
    engine = Engine(config, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), DEVICE, torch.float32, FUSED)
    engine.initialize()
    decoder = next(engine.models())
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = decoder(torch.zeros(1, 48, dtype=torch.long))
    planned = estimate(config, Layout(), torch.float32, kernels=FUSED).heaviest.memory.activations
    assert planned == pytest.approx(sum(kept.values()) + y.nbytes, rel=0.05)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU adds the rows of an embedding's gradient in another way")
def test_a_gpu_adds_an_embeddings_rows_always_in_one_order() -> None:
    ids = torch.randint(0, 20, (4096,))
    grad = torch.randn(4096, 64)
    found = []
    for device in ("cpu", DEVICE, DEVICE):
        weight = torch.nn.Parameter(torch.zeros(500, 64, device=device))
        weight.main_grad, weight.grad_empty = torch.ones(500, 64, device=device), False  # type: ignore[attr-defined]
        embed(ids.to(device), weight).backward(grad.to(device))
        found.append(weight.main_grad.cpu())  # type: ignore[attr-defined]
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[1], found[0])
