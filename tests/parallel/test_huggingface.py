"""From transformers to the engine at TP2 and back: equal logits, equal loss, equal bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toys

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=101, max_position_embeddings=64)
"""Grouped queries and an odd vocabulary."""
FLAGS = "--dtype fp32 --micro-batch 2 --global-batch 4 --seq-len 16 --steps 4"


def run_tp(rank: int, world: int, folder: str, out: str) -> Any:
    """On a rank: loads the folder, gives the logits of a batch (all vocabulary shards) and its loss, and saves."""
    import torch
    import torch.distributed as dist

    from engine.checkpoint import load_weights, save_checkpoint
    from engine.config import to_dict
    from engine.config.flags import build, parse_values
    from engine.hf import assets_for, open_hf
    from engine.model.shapes import logical_shapes

    source = open_hf(folder)
    config = build(parse_values([*FLAGS.split(), "--tp", str(world)]), source.config)
    engine = toys.make_engine(config, rank, world)
    own = [entry for entry in engine.optimizer.entries() if entry.kind == "model"]
    load_weights(source, own, logical_shapes(config.model))
    engine.optimizer.gather()
    batch = toys.make_batch(config, 0, 0, 1)
    model = next(engine.models())
    with torch.no_grad():
        part = model.logits(model(torch.from_numpy(batch.tokens)))
    shards = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(shards, part.contiguous())
    loss = engine.evaluate([batch])
    save_checkpoint(Path(out) / "checkpoints", 0, engine.optimizer.entries(), rank=rank, world=world,
                    agree=engine.agree, meta={"samples": 0, "config": to_dict(config), "world": {"tp": world}},
                    assets=assets_for(config.model, None))
    return torch.cat(shards, dim=-1)[..., : config.model.vocab_size].numpy(), loss


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_to_tp2_and_back(ranks: Any, tmp_path: Path, tied: bool) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.hf.convert import convert

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "hf")
    results = ranks(2, run_tp, folder=str(tmp_path / "hf"), out=str(tmp_path / "run"))

    batch = toys.make_batch(toys.make_config(f"--vocab-size 101 {FLAGS}"), 0, 0, 1)
    ids, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    with torch.no_grad():
        # transformers shifts labels by itself: its label i is the token at i, ours the one after it.
        shifted = torch.cat([torch.full((len(ids), 1), -100), labels[:, :-1]], dim=1)
        theirs = model(input_ids=ids, labels=shifted)
        wanted = theirs.logits.numpy()
        tokens = torch.nn.functional.cross_entropy(theirs.logits.double().flatten(0, 1), labels.flatten())
    for logits, loss in results:
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()
        assert loss == pytest.approx(float(tokens), rel=1e-6)
    # Their own loss leaves out the last position, whose label lies outside the ids: the same tokens, the same mean.
    inner = torch.nn.functional.cross_entropy(theirs.logits[:, :-1].double().flatten(0, 1), labels[:, :-1].flatten())
    assert float(theirs.loss) == pytest.approx(float(inner), rel=1e-6)

    convert(tmp_path / "run", tmp_path / "back", to="hf", dtype=None, shard_bytes=5 << 30, say=lambda *_: None)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
