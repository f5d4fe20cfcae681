"""Llama and its kin (Mistral, Qwen2, Qwen3): our logical names are theirs, so converting is copying."""

from __future__ import annotations

import re
from typing import Any

from engine.config import ModelConfig
from engine.errors import UserError
from engine.hf.family import Family, Held
from engine.hf.keys import Keys
from engine.model.shapes import logical_shapes

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def from_hf(keys: Keys) -> ModelConfig:
    """The ModelConfig of a config.json."""
    kind = keys.get("model_type")
    keys.only("hidden_act", ("silu",), "only silu (SwiGLU) is computed")
    keys.only("partial_rotary_factor", (1, 1.0), "RoPE turns whole heads")
    _full_attention(keys, kind)
    heads, hidden = keys.whole("num_attention_heads", 1 << 14), keys.whole("hidden_size", 1 << 20)
    # Qwen3's class has a head_dim of its own where the file has none; the others derive it.
    head_dim = keys.whole("head_dim", 1 << 14, 128 if kind == "qwen3" else max(1, hidden // heads))
    if keys.content.get("head_dim") is None and kind != "qwen3" and hidden % heads:
        raise UserError(f"{keys.place}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    kv_heads = keys.whole("num_key_value_heads", 1 << 14, heads)
    if heads % kv_heads:
        raise UserError(f"{keys.place}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise UserError(f"{keys.place}: head_dim {head_dim} is odd, and RoPE rotates pairs")
    bias = keys.flag("attention_bias", False) if kind in ("llama", "qwen3") else False
    return ModelConfig(
        family="llama", layers=keys.whole("num_hidden_layers", 10_000), hidden=hidden,
        ffn_hidden=keys.whole("intermediate_size", 1 << 22), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocab_size=keys.whole("vocab_size", 1 << 24), max_positions=keys.whole("max_position_embeddings", 1 << 31),
        norm_eps=keys.positive("rms_norm_eps"), rope_theta=_rope_theta(keys), qkv_bias=bias or kind == "qwen2",
        out_bias=bias, mlp_bias=keys.flag("mlp_bias", False) if kind == "llama" else False, qk_norm=kind == "qwen3",
        tied=keys.flag("tie_word_embeddings", False), init_std=keys.number("initializer_range", 0.02))


def _full_attention(keys: Keys, kind: str) -> None:
    """Refuses sliding windows, which are not computed; one as long as the positions is none."""
    # Mistral's class slides over 4096 tokens where the file does not speak of it.
    window = keys.content.get("sliding_window", 4096 if kind == "mistral" else None)
    used = kind == "mistral" or keys.flag("use_sliding_window", False)
    positions = keys.whole("max_position_embeddings", 1 << 31)
    if used and window is not None and keys.whole("sliding_window", 1 << 40, 4096) < positions:
        raise UserError(f"{keys.place}: sliding_window {window} is not supported: attention is over all tokens before")
    kinds = keys.get("layer_types", [])
    if not isinstance(kinds, list) or any(word != "full_attention" for word in kinds):
        raise UserError(f"{keys.place}: layer_types other than full_attention are not supported")


def _rope_theta(keys: Keys) -> float:
    """rope_theta from the old key or the new rope_parameters; any scaling is refused."""
    scaling = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = keys.get(key, {})
        if not isinstance(value, dict):
            raise keys.fail(key, "is not a table")
        scaling.update(value)
        for word in (value.get("rope_type"), value.get("type")):
            if word not in (None, "default"):
                raise UserError(f"{keys.place}: {key} {str(word)[:40]!r} is not supported: RoPE is computed unscaled")
    inner = Keys(scaling, f"{keys.place}: rope_parameters")
    inner.only("partial_rotary_factor", (1, 1.0), "RoPE turns whole heads")
    old, new = keys.positive("rope_theta", 10000.0), inner.positive("rope_theta", 10000.0)
    if "rope_theta" in keys.content and "rope_theta" in scaling and old != new:
        raise UserError(f"{keys.place}: rope_theta is {old} and {new} in rope_parameters")
    return new if "rope_theta" in scaling else old


def model_type(config: ModelConfig) -> str:
    """The HF class that computes this network; UserError where there is none."""
    if config.qk_norm and config.qkv_bias == config.out_bias and not config.mlp_bias:
        return "qwen3"
    if config.qkv_bias == config.out_bias and not config.qk_norm:
        return "llama"
    if config.qkv_bias and not config.out_bias and not config.qk_norm and not config.mlp_bias:
        return "qwen2"
    raise UserError(f"no Hugging Face class has qkv-bias {config.qkv_bias}, out-bias {config.out_bias}, mlp-bias "
                    f"{config.mlp_bias} and qk-norm {config.qk_norm} together")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that describe the network."""
    kind = model_type(config)
    found: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_act": "silu", "hidden_size": config.hidden,
        "intermediate_size": config.ffn_hidden, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps,
        # The old keys: transformers 4 does not read rope_parameters and takes its default without a word.
        "rope_theta": config.rope_theta, "rope_scaling": None, "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std, "attention_dropout": 0.0, "use_cache": True}
    if kind != "qwen2":
        found["attention_bias"] = config.qkv_bias
    if kind == "llama":
        found["mlp_bias"] = config.mlp_bias
    else:
        found |= {"use_sliding_window": False, "sliding_window": None}
    return found


def tensors(config: ModelConfig) -> dict[str, Held]:
    """HF name -> what it holds: itself."""
    return {name: Held((name,)) for name in logical_shapes(config)}


FAMILY = Family(("llama", "mistral", "qwen2", "qwen3"), from_hf, to_hf, tensors,
                ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"))
