"""Named model shapes, and how a preset and single fields make one ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.config.schema import ModelConfig
from engine.errors import UserError, shown


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return dict(layers=layers, hidden=hidden, ffn_hidden=ffn, heads=heads, kv_heads=kv_heads,
                head_dim=hidden // heads, vocab_size=vocab, **more)


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "tiny": _llama(4, 256, 688, 8, 4, 4096),
    "125m": _llama(12, 768, 2048, 12, 12, 32000),
    "1b": _llama(22, 2048, 5632, 32, 4, 32000),  # TinyLlama, arXiv:2401.02385
    "7b": _llama(32, 4096, 11008, 32, 32, 32000),  # Llama 2, arXiv:2307.09288
    "8b": _llama(32, 4096, 14336, 32, 8, 128256, rope_theta=500000.0, max_positions=8192),  # Llama 3, arXiv:2407.21783
    "13b": _llama(40, 5120, 13824, 40, 40, 32000),
    "70b": _llama(80, 8192, 28672, 64, 8, 32000),
    "gpt2": _llama(12, 768, 3072, 12, 12, 50257, family="gpt2", max_positions=1024, qkv_bias=True, out_bias=True,
                   mlp_bias=True, tied=True),
})
"""Fields that differ from ModelConfig's defaults; sources beside the sizes that have one."""


SIZES = frozenset(PRESETS["tiny"])
"""What every preset says. A config that gives all of it needs no preset, and its `model` may be any name."""


OWN = ("vocab_size", "max_positions")
"""What a model of a preset's shape has of its own: the tokenizer's vocabulary, the longest sequence."""


def resolve_model(given: Mapping[str, Any], base: ModelConfig | None = None) -> ModelConfig:
    """The ModelConfig of the fields `given`, over `base` (a loaded checkpoint's) or over the preset they name.

    `--hidden` or `--heads` alone moves `head_dim` along (hidden / heads), as the preset had it; `--heads` alone
    moves `kv_heads` where the preset had no grouping. A loaded model keeps its own name.
    Raises UserError for an unknown preset.
    """
    name = given.get("model", "tiny" if base is None else base.model)
    known = name in PRESETS or SIZES <= given.keys() or (base is not None and name == base.model)
    if not known:
        # No guess but for capitals: 3b is not 13b, and gpt3 is not gpt2.
        hint = f"did you mean {name.lower()}?" if name.lower() in PRESETS else f"use one of {', '.join(PRESETS)}"
        hint = hint if base is None else "a loaded model keeps its own name, so leave the flag out"
        raise UserError(f"--model '{shown(name, 60)}' is not a preset; {hint}")
    start = vars(base) if base is not None else {"model": name, **PRESETS.get(name, {})}
    merged = {**start, **given, "model": name if base is None else base.model}
    if "kv_heads" not in given and start["kv_heads"] == start["heads"]:
        merged["kv_heads"] = merged["heads"]
    if "head_dim" not in given and start["head_dim"] * start["heads"] == start["hidden"] and merged["heads"] > 0:
        merged["head_dim"] = merged["hidden"] // merged["heads"]
    return ModelConfig(**merged)


def title(model: ModelConfig) -> str:
    """What reports call a model: its name, and where it is a preset's, what is changed of it: `tiny with layers 12`."""
    preset = PRESETS.get(model.model, {})
    changed = [f"{name.replace('_', '-')} {getattr(model, name)}" for name, value in preset.items()
               if name not in OWN and getattr(model, name) != value]
    more = [f"{len(changed) - 3} more"] * (len(changed) > 3)
    return f"{model.model} with {', '.join(changed[:3] + more)}" if changed else model.model


def preset_fault(name: str, given: Mapping[str, Any], base: ModelConfig) -> str | None:
    """The first field in which the preset `name`, with the fields `given` beside it, is another network than `base`;
    None where they agree, or there is no such preset. The vocabulary and the longest sequence are the model's own."""
    for field, value in PRESETS.get(name, {}).items():
        if field not in given and field not in OWN and getattr(base, field) != value:
            return field
    return None
