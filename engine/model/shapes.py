"""Every logical tensor of a model with its unpadded shape, without building any of it."""

from __future__ import annotations

from engine.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""The matrices with a row for each piece of the vocabulary; a tied model has the first alone."""


def logical_shapes(config: ModelConfig) -> Shapes:
    """Logical name -> shape of all parameters, in the order of the model; a tied head is the embedding alone."""
    found: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden)}
    if config.family == "gpt2":
        found["model.embed_positions.weight"] = (config.max_positions, config.hidden)
    for layer in range(config.layers):
        name = f"model.layers.{layer}"
        found |= _norm(f"{name}.input_layernorm", config)
        found |= _attention(f"{name}.self_attn", config)
        found |= _norm(f"{name}.post_attention_layernorm", config)
        found |= _mlp(f"{name}.mlp", config)
    found |= _norm("model.norm", config)
    if not config.tied:
        found["lm_head.weight"] = (config.vocab_size, config.hidden)
    return found


def _norm(name: str, config: ModelConfig) -> Shapes:
    found: Shapes = {f"{name}.weight": (config.hidden,)}
    if config.family == "gpt2":
        found[f"{name}.bias"] = (config.hidden,)
    return found


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    found: Shapes = {f"{name}.weight": (outputs, inputs)}
    if bias:
        found[f"{name}.bias"] = (outputs,)
    return found


def _attention(name: str, config: ModelConfig) -> Shapes:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    found: Shapes = {}
    for proj, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        found |= _linear(f"{name}.{proj}", rows, config.hidden, config.qkv_bias)
    found |= _linear(f"{name}.o_proj", config.hidden, queries, config.out_bias)
    if config.qk_norm:
        found |= {f"{name}.q_norm.weight": (config.head_dim,), f"{name}.k_norm.weight": (config.head_dim,)}
    return found


def _mlp(name: str, config: ModelConfig) -> Shapes:
    found: Shapes = {}
    for proj in ("up_proj",) if config.family == "gpt2" else ("gate_proj", "up_proj"):
        found |= _linear(f"{name}.{proj}", config.ffn_hidden, config.hidden, config.mlp_bias)
    return found | _linear(f"{name}.down_proj", config.hidden, config.ffn_hidden, config.mlp_bias)
