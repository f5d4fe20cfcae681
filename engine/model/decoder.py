"""The decoder: embedding, blocks, final norm and head. A pipeline stage builds the part of it that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.kernels.cross_entropy import cross_entropy
from engine.kernels.rope import rope_table
from engine.model.attention import Attention, Rope
from engine.model.cache import LayerCache
from engine.model.mlp import MLP
from engine.model.parts import Parts, make_norm
from engine.parallel.layers import VocabParallelEmbedding, VocabParallelHead, vocab_parameter
from engine.parallel.sharding import Shard, make_parameter, whole

EMBEDDING = "model.embed_tokens.weight"


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, layer: int, parts: Parts) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.recompute = parts.recompute
        self.attention_norm = make_norm(f"{name}.input_layernorm", parts)
        self.attention = Attention(f"{name}.self_attn", parts)
        self.mlp_norm = make_norm(f"{name}.post_attention_layernorm", parts)
        self.mlp = MLP(f"{name}.mlp", parts)

    def forward(self, x: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return cast(torch.Tensor, checkpoint(self.run, x, rope, use_reentrant=False, preserve_rng_state=False))
        return self.run(x, rope, cache)

    def run(self, x: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        """The block itself; with --recompute, what the backward pass runs again."""
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return cast(torch.Tensor, x + self.mlp(self.mlp_norm(x)))


class Embedding(nn.Module):
    """Token embedding, and learned positions where the family has them."""

    def __init__(self, weight: nn.Parameter, parts: Parts) -> None:
        super().__init__()
        self.tp = parts.tp
        self.tokens = VocabParallelEmbedding(weight, parts.tp)
        self.positions: nn.Parameter | None = None
        if parts.config.family == "gpt2":
            shape = (parts.config.max_positions, parts.config.hidden)
            # Added after the token embedding has been split along the sequence: then each rank's gradient is a part.
            member = whole("model.embed_positions.weight", shape, primary=parts.tp.rank == 0,
                           partial="tp" if parts.tp.sequence else None)
            self.positions = make_parameter(shape, Shard((member,), std=parts.config.init_std), parts.dtype,
                                            parts.device)

    def forward(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        x = self.tokens(ids)  # [batch, seq or seq/tp, hidden]
        if self.positions is not None:
            first = position + (self.tp.rank * x.shape[1] if self.tp.sequence else 0)
            x = x + self.positions[first : first + x.shape[1]]
        return cast(torch.Tensor, x)


class Decoder(nn.Module):
    """Layers `layers` of the model, with the embedding if `first` and the final norm and head if `last`.

    Forward: token ids [batch, seq] on the first stage, activations [batch, seq or seq/tp, hidden] on the others; gives
    activations, or logits [batch, seq, vocab/tp] on the last stage.
    """

    def __init__(self, parts: Parts, layers: Sequence[int], *, first: bool = True, last: bool = True) -> None:
        super().__init__()
        config = parts.config
        self.parts = parts
        self.first, self.last = first, last
        head_name = EMBEDDING if config.tied else "lm_head.weight"
        weight = self._vocab(EMBEDDING, primary=True) if first else None
        self.embedding = Embedding(weight, parts) if weight is not None else None
        self.blocks = nn.ModuleList(Block(layer, parts) for layer in layers)
        self.norm = make_norm("model.norm", parts) if last else None
        self.head: VocabParallelHead | None = None
        if last:
            shared = weight if config.tied and weight is not None else self._vocab(head_name, primary=not config.tied)
            self.head = VocabParallelHead(shared, parts.tp)

    def _vocab(self, name: str, primary: bool) -> nn.Parameter:
        parts = self.parts
        alone = self.first and self.last  # a tied weight is then one parameter, used twice; else two copies
        return vocab_parameter(
            name, parts.config.vocab_size, parts.padded_vocab, parts.config.hidden, std=parts.config.init_std,
            tp=parts.tp, tied=parts.config.tied and not alone, uses=2 if parts.config.tied and alone else 1,
            primary=primary, dtype=parts.dtype, device=parts.device)

    def forward(self, x: torch.Tensor, *, position: int = 0,
                caches: Sequence[LayerCache] | None = None) -> torch.Tensor:
        if self.embedding is not None:
            seq = x.shape[1]
            x = self.embedding(x, position)
        else:
            seq = x.shape[1] * (self.parts.tp.size if self.parts.tp.sequence else 1)
        rope = self._rope(position, seq)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, caches[i] if caches is not None else None)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x

    def _rope(self, position: int, seq: int) -> Rope:
        config = self.parts.config
        if config.family == "gpt2":
            return None
        positions = torch.arange(position, position + seq, device=self.parts.device)
        return rope_table(positions, config.head_dim, config.rope_theta, self.parts.dtype)

    def boundary(self, batch: int, seq: int) -> torch.Tensor:
        """Empty memory for an activation between stages: [batch, seq or seq/tp, hidden]."""
        parts = self.parts
        part = parts.tp.share(seq) if parts.tp.sequence else seq
        return torch.empty(batch, part, parts.config.hidden, dtype=parts.dtype, device=parts.device)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each token [batch * seq], 0 where not supervised; uses up the logits [batch, seq, vocab/tp]."""
        tp = self.parts.tp
        columns = logits.shape[-1]
        return cross_entropy(logits.reshape(-1, columns), labels.reshape(-1), first=tp.rank * columns,
                             vocab=self.parts.config.vocab_size, group=tp.group)


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage; the first stages take one more where they do not divide (the last has the head)."""
    each, more = divmod(layers, stages)
    bounds = [0]
    for stage in range(stages):
        bounds.append(bounds[-1] + each + (stage < more))
    return [range(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
