"""Each field of the model is considered by the planner: what it changes is written down here, and holds."""

from __future__ import annotations

from dataclasses import fields
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Layout, ModelConfig, RunConfig, parse
from engine.kernels.dispatch import Kernels
from engine.model import Decoder, Parts
from engine.model.shapes import logical_shapes
from engine.plan import estimate, flops_per_token, parameters

BASE = ("--layers 2 --hidden 64 --ffn-hidden 160 --heads 4 --kv-heads 2 --head-dim 16 --vocab-size 256 --seq-len 64 "
        "--micro-batch 2")
NOTHING: frozenset[str] = frozenset()
STATES = frozenset({"parameters", "states"})
ALL = STATES | {"flops", "activations"}
CHANGES = {
    # field: flags that change it alone, what the planner then says differently
    "model": ("--model 125m", NOTHING),
    "family": ("--family gpt2 --kv-heads 2", ALL),
    "layers": ("--layers 3", ALL),
    "hidden": ("--hidden 128 --head-dim 16", ALL),
    "ffn_hidden": ("--ffn-hidden 192", ALL),
    "heads": ("--heads 8 --head-dim 16", ALL),
    "kv_heads": ("--kv-heads 4", ALL),
    "head_dim": ("--head-dim 32", ALL),
    "vocab_size": ("--vocab-size 512", STATES | {"flops"}),
    "max_positions": ("--max-positions 128", NOTHING),
    "norm_eps": ("--norm-eps 1e-6", NOTHING),
    "rope_theta": ("--rope-theta 5e5", NOTHING),
    "qkv_bias": ("--qkv-bias", STATES),
    "out_bias": ("--out-bias", STATES),
    "mlp_bias": ("--mlp-bias", STATES),
    "qk_norm": ("--qk-norm", STATES | {"activations"}),
    "tied": ("--tied", STATES),
    "init_std": ("--init-std 0.1", NOTHING),
}


def planned(config: RunConfig) -> dict[str, float]:
    """What the planner says that hangs on the model: parameters, FLOPs a token, bytes of states and of activations."""
    plan = estimate(config, Layout(), torch.float32)
    memory = plan.heaviest.memory
    return {"parameters": plan.parameters, "flops": plan.flops_per_token, "activations": memory.activations,
            "states": memory.weights + memory.gradients + memory.optimizer}


def counted_flops(config: RunConfig) -> float:
    """FLOPs a token of training as torch counts them in a real forward pass, the causal half of attention left out."""
    model, batch = config.model, config.batch
    decoder = Decoder(Parts(model, kernels=Kernels(attention="reference")), range(model.layers))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.logits(decoder(torch.zeros(batch.micro_batch, batch.seq_len, dtype=torch.long)))
    causal = model.layers * 2 * model.heads * model.head_dim * batch.seq_len
    return 3 * (counter.get_total_flops() / (batch.micro_batch * batch.seq_len) - causal)


@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig)])
def test_the_planner_knows_what_a_field_of_the_model_changes(name: str) -> None:
    assert name in CHANGES, f"say in CHANGES what {name} changes of parameters, FLOPs and memory, and make it true"
    flags, expected = CHANGES[name]
    before, after = parse(BASE.split()), parse(f"{BASE} {flags}".split())
    changed = {key for key in vars(before.model) if getattr(before.model, key) != getattr(after.model, key)}
    assert changed == {name}
    old, new = planned(before), planned(after)
    assert {key for key in old if old[key] != new[key]} == expected
    assert new["parameters"] == sum(map(prod, logical_shapes(after.model).values())) == parameters(after.model)
    assert flops_per_token(after.model, 64) == counted_flops(after)


def test_learned_positions_are_parameters() -> None:
    flags = f"{BASE} --family gpt2 --max-positions"
    old, new = (planned(parse(f"{flags} {count}".split())) for count in (64, 128))
    assert {key for key in old if old[key] != new[key]} == STATES
