"""GPT-2: its Conv1D weights are [in, out], q, k and v are one tensor, and its names are older than the others'."""

from __future__ import annotations

import re
from typing import Any

from engine.config import ModelConfig
from engine.errors import UserError
from engine.hf.family import Family, Held
from engine.hf.keys import Keys

LAYER = (
    ("ln_1", ("input_layernorm",)), ("attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attn.c_proj", ("self_attn.o_proj",)), ("ln_2", ("post_attention_layernorm",)), ("mlp.c_fc", ("mlp.up_proj",)),
    ("mlp.c_proj", ("mlp.down_proj",)),
)
"""Their module -> the modules it stacks, in one layer; each has a weight and a bias."""


def from_hf(keys: Keys) -> ModelConfig:
    """The ModelConfig of a config.json."""
    keys.only("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "only the tanh GELU is computed")
    keys.only("scale_attn_weights", (True,), "scores are scaled by 1 / sqrt(head_dim)")
    keys.only("scale_attn_by_inverse_layer_idx", (False,), "scores are scaled alike in all layers")
    keys.only("add_cross_attention", (False,), "there is no encoder")
    hidden, heads = keys.whole("n_embd", 1 << 20), keys.whole("n_head", 1 << 14)
    if hidden % heads:
        raise UserError(f"{keys.place}: n_embd {hidden} is not divisible by n_head {heads}")
    return ModelConfig(
        family="gpt2", layers=keys.whole("n_layer", 10_000), hidden=hidden, heads=heads, kv_heads=heads,
        ffn_hidden=keys.whole("n_inner", 1 << 22, 4 * hidden), head_dim=hidden // heads,
        vocab_size=keys.whole("vocab_size", 1 << 24), max_positions=keys.whole("n_positions", 1 << 24),
        norm_eps=keys.positive("layer_norm_epsilon", 1e-5), qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=keys.flag("tie_word_embeddings", True), init_std=keys.number("initializer_range", 0.02))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that describe the network."""
    if not (config.qkv_bias and config.out_bias and config.mlp_bias):
        raise UserError("Hugging Face's GPT-2 has all biases; this model lacks some (qkv-bias, out-bias, mlp-bias)")
    if config.qk_norm or config.kv_heads != config.heads or config.heads * config.head_dim != config.hidden:
        raise UserError("Hugging Face's GPT-2 has no qk-norm, kv-heads equal to heads, and heads x head-dim = hidden; "
                        f"this model has heads {config.heads}, kv-heads {config.kv_heads}, head-dim {config.head_dim}, "
                        f"hidden {config.hidden}, qk-norm {config.qk_norm}")
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
            "n_embd": config.hidden, "n_layer": config.layers, "n_head": config.heads, "n_inner": config.ffn_hidden,
            "n_positions": config.max_positions, "n_ctx": config.max_positions, "vocab_size": config.vocab_size,
            "layer_norm_epsilon": config.norm_eps, "tie_word_embeddings": config.tied,
            "initializer_range": config.init_std, "scale_attn_weights": True, "use_cache": True,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tensors(config: ModelConfig) -> dict[str, Held]:
    """HF name -> what it holds."""
    found = {"transformer.wte.weight": Held(("model.embed_tokens.weight",)),
             "transformer.wpe.weight": Held(("model.embed_positions.weight",))}
    for layer in range(config.layers):
        for theirs, ours in LAYER:
            for kind in ("weight", "bias"):
                found[f"transformer.h.{layer}.{theirs}.{kind}"] = Held(
                    tuple(f"model.layers.{layer}.{module}.{kind}" for module in ours),
                    transpose=kind == "weight" and not theirs.startswith("ln"))
    found["transformer.ln_f.weight"] = Held(("model.norm.weight",))
    found["transformer.ln_f.bias"] = Held(("model.norm.bias",))
    if not config.tied:
        found["lm_head.weight"] = Held(("lm_head.weight",))
    return found


def canonical(name: str) -> str:
    """The published gpt2 files leave the prefix out."""
    return f"transformer.{name}" if re.match(r"(wte|wpe|h\.\d+|ln_f)\.", name) else name


FAMILY = Family(("gpt2",), from_hf, to_hf, tensors, canonical,
                ignored=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"), unused=frozenset({"rope_theta"}))
