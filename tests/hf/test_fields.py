"""No field of a model is lost on export: each changes config.json and comes back, or the export is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from engine.config import ModelConfig, RunConfig, check
from engine.errors import UserError
from engine.hf import TokenIds, config_from_hf, config_to_hf
from engine.hf.config import FAMILIES
from engine.hf.convert import same_network

LLAMA = ModelConfig(layers=2, hidden=32, ffn_hidden=48, heads=4, kv_heads=4, head_dim=8, vocab_size=64)
BASES = {"llama": LLAMA, "gpt2": replace(LLAMA, family="gpt2", qkv_bias=True, out_bias=True, mlp_bias=True)}
VALUES: dict[str, tuple[Any, ...]] = {
    "layers": (3,), "hidden": (64,), "ffn_hidden": (80,), "heads": (8,), "kv_heads": (2,), "head_dim": (16,),
    "vocab_size": (65,), "max_positions": (77,), "norm_eps": (1e-6, 0.1 + 0.2), "rope_theta": (5e5, 1e4 / 3),
    "qkv_bias": (True, False), "out_bias": (True, False), "mlp_bias": (True, False), "qk_norm": (True,),
    "tied": (True,), "init_std": (0.5, 0.0)}
"""Other values than the bases' for every field; `model` is a name, and `family` has its bases."""


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig) if field.name not in ("model", "family")])
def test_a_field_changes_config_json_or_is_refused(family: str, name: str) -> None:
    assert name in VALUES, f"give another value of {name} than its default, and a place in config.json or a refusal"
    base = BASES[family]
    others = [value for value in VALUES[name] if value != getattr(base, name)]
    assert others
    for value in others:
        config = replace(base, **{name: value})
        if name in FAMILIES[family].unused:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
                check(RunConfig(model=config), 1)
            continue
        try:
            content = config_to_hf(config, TokenIds())
        except UserError as refused:
            assert "Hugging Face" in str(refused) and str(value) in str(refused) or "qkv-bias" in str(refused)
            continue
        assert content != config_to_hf(base, TokenIds()) and not same_network(config, base)
        assert config_from_hf(json.loads(json.dumps(content))) == config


@dataclass(frozen=True, kw_only=True)
class Newer(ModelConfig):
    """What ModelConfig becomes when a field is added and forgotten in the families."""

    sliding_window: int = 0


@pytest.mark.parametrize("family", BASES)
def test_a_field_that_a_family_forgets_is_refused_by_name(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = {name: replace(item, from_hf=lambda keys, item=item: Newer(**vars(item.from_hf(keys))))
                 for name, item in FAMILIES.items()}
    monkeypatch.setattr("engine.hf.config.FAMILIES", forgetful)
    config_to_hf(Newer(**vars(BASES[family])), TokenIds())
    with pytest.raises(UserError, match="has no place for sliding-window 16: its config.json would say 0"):
        config_to_hf(Newer(**vars(BASES[family]), sliding_window=16), TokenIds())
