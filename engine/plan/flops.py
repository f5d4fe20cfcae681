"""Parameters, FLOPs a token, and what a device can do at most: what MFU is made of."""

from __future__ import annotations

import re
from math import prod

import torch

from engine.config import ModelConfig, RunConfig
from engine.config.recompute import read_recompute
from engine.model import stage_layers
from engine.model.shapes import logical_shapes

PEAKS = (
    # device name, dense bf16 with fp32 accumulation, fp32 without tf32; TFLOP/s of the vendors' data sheets
    (r"B200", 2250.0, 75.0),
    (r"H100 PCIe", 756.0, 51.0),
    (r"H100 NVL", 835.0, 60.0),
    (r"H20\b", 148.0, 44.0),
    (r"H100|H200|H800|GH200", 989.4, 66.9),
    (r"A100|A800", 312.0, 19.5),
    (r"L40S", 362.0, 91.6),
    (r"L40\b", 181.0, 90.5),
    (r"L4\b", 121.0, 30.3),
    (r"RTX 6000 Ada", 364.2, 91.1),
    (r"A6000", 154.8, 38.7),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090\b", 71.0, 35.6),
)
"""The first name that is found wins, so special forms stand before the general one."""


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of training on one token, forward and backward, recomputation not counted (PaLM, arXiv:2204.02311, app. B).

    6 for each parameter of a matrix product (the head counts, the embedding look-up does not), and 6 x layers x heads
    x head_dim x seq_len for attention: PaLM's 12, halved, because a causal query sees half the keys on average.
    """
    return 6.0 * (model.layers * layer_matrices(model) + model.vocab_size * model.hidden) + 3.0 * (
        model.layers * layer_attention(model, seq_len))


def flops_of(model: ModelConfig, tokens: int, squares: int) -> float:
    """FLOPs of training on sequences of any lengths, as flops_per_token counts them: `tokens` is the sum of the
    lengths, `squares` the sum of their squares."""
    each = flops_per_token(model, 0)
    return each * tokens + (flops_per_token(model, 1) - each) * squares


def layer_matrices(model: ModelConfig) -> int:
    """Parameters of one layer's matrices."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return attention + model.hidden * model.ffn_hidden * (2 if model.family == "gpt2" else 3)


def layer_attention(model: ModelConfig, seq_len: int) -> float:
    """FLOPs a token of one layer's causal attention, forward: two products of 2 head_dim over seq_len / 2 keys."""
    return 2.0 * model.heads * model.head_dim * seq_len


def balanced_stages(config: RunConfig, stages: int) -> list[range]:
    """The layers of each of a pipeline's stages, the head's FLOPs weighed against those of layers."""
    model, seq = config.model, config.batch.seq_len
    # A forward, a backward of twice the work, and a second forward where blocks are run again. Where some of each
    # stage are, stages have as many of them, so that they do not count.
    passes = 4.0 if read_recompute(config.runtime.recompute).blocks * stages >= model.layers else 3.0
    layer = passes * (2.0 * layer_matrices(model) + layer_attention(model, seq))
    return stage_layers(model.layers, stages, 6.0 * model.vocab_size * model.hidden / layer)


def parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, padding left out and a tied embedding counted once."""
    return sum(prod(shape) for shape in logical_shapes(model).values())


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The highest dense rate of a GPU by its name (`torch.cuda.get_device_name`), in FLOP/s; None when unknown, and
    for CPUs, whose rate hangs on cores and clock."""
    column = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1}.get(dtype)
    if column is None:
        return None
    for name, *rates in PEAKS:
        if re.search(rf"\b(?:{name})", device_name):
            return rates[column] * 1e12
    return None
