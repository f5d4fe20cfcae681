"""The planner sees what is made again, and `--recompute auto` takes the least that fits."""

from __future__ import annotations

import pytest
import torch

from engine.config import Layout, check
from engine.config.recompute import FULL, NONE, SELECTIVE, Recompute, read_recompute
from engine.errors import UserError
from engine.kernels.dispatch import Kernels
from engine.plan import Capacity, balanced_stages, estimate, least_recompute, require_memory, with_recompute
from engine.plan.trace import Tracer
from tests.plan.test_plan import GPT2, LLAMA, config_of


def test_selective_keeps_157_of_538_mb_less_in_a_layer_of_the_7b_model() -> None:
    """Two normed inputs of 4,096 and an MLP's 11,008 columns, of 4,096 tokens in bf16."""
    fused = Kernels(norm="triton", rope="triton", activation="triton", loss="triton", attention="triton")
    kept = [[estimate(config_of(f"--model 7b --layers {layers} --seq-len 4096 --recompute {kind}"), Layout(),
                      torch.bfloat16, kernels=fused).heaviest.memory.activations for layers in (2, 3)]
            for kind in ("none", "selective")]
    none, selective = (three - two for two, three in kept)
    assert none - selective == 4096 * 2 * (2 * 4096 + 11008)
    assert none == pytest.approx(538e6, rel=0.01)


@pytest.mark.parametrize("flags", [LLAMA, GPT2, f"{LLAMA} --qk-norm --tp 2 --sequence-parallel --vocab-size 256"])
def test_the_need_falls_from_rung_to_rung_and_may_rise_at_the_end(flags: str) -> None:
    config = config_of(f"{flags} --layers 6")
    rungs = [NONE, SELECTIVE, *(Recompute(blocks, selective=True) for blocks in range(1, 6)), FULL]
    assert [Recompute.of_rung(rung.rung) for rung in rungs] == rungs
    assert [read_recompute(str(rung)) for rung in rungs] == rungs
    layout, tracer = check(config, config.parallel.tp), Tracer()
    memory = [estimate(with_recompute(config, rung), layout, torch.bfloat16, tracer).heaviest.memory for rung in rungs]
    assert [one.activations for one in memory] == sorted({one.activations for one in memory}, reverse=True)
    needs = [one.total for one in memory]
    least = needs.index(min(needs))
    assert least >= 5
    assert needs[: least + 1] == sorted(needs[: least + 1], reverse=True) and needs[least:] == sorted(needs[least:])


def test_auto_takes_the_least_that_fits_and_says_why() -> None:
    config = config_of(f"{LLAMA} --layers 6 --recompute auto")
    layout, dtype, tracer = Layout(), torch.float32, Tracer()
    rungs = [NONE, SELECTIVE, *(Recompute(blocks, selective=True) for blocks in range(1, 6)), FULL]
    needs = [estimate(with_recompute(config, rung), layout, dtype, tracer).heaviest.memory.total for rung in rungs]
    assert needs.index(min(needs)) >= 5
    for rung, need in zip(rungs[: needs.index(min(needs)) + 1], needs, strict=False):
        plan, why = least_recompute(config, layout, dtype, Kernels(), Capacity("this machine", need), tracer)
        assert plan.config == with_recompute(config, rung) and plan.heaviest.memory.total == need
        assert why.startswith(f"--recompute auto takes {rung}: the fullest rank needs ")
        assert len(why.splitlines()) == 1
    small = Capacity("this machine", min(needs) - 1)
    plan, why = least_recompute(config, layout, dtype, Kernels(), small, tracer)
    assert plan.heaviest.memory.total == min(needs)
    with pytest.raises(UserError, match="this machine has"):
        require_memory(plan, small)
    plan, why = least_recompute(config, layout, dtype, Kernels(), None, tracer)
    assert plan.config.runtime.recompute == "none" and " with none, " in why and why.endswith(" with full")


def test_auto_counts_the_layers_of_uneven_stages() -> None:
    config = config_of(f"{LLAMA} --layers 7 --pp 3 --vocab-size 8192 --recompute auto")
    layout = check(config, 3)
    spans = balanced_stages(with_recompute(config, FULL), 3)
    assert len({len(span) for span in spans}) > 1
    full = estimate(with_recompute(config, FULL), layout, torch.float32).heaviest.memory.total
    plan, _ = least_recompute(config, layout, torch.float32, Kernels(), Capacity("this machine", full))
    assert plan.heaviest.memory.total <= full
