"""The decoder: embedding, blocks, final norm and head. A pipeline stage builds the part of it that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.kernels.rope import rope_table
from engine.model.attention import Attention, Rope
from engine.model.cache import LayerCache
from engine.model.mlp import MLP
from engine.model.parts import Norm, Parts, make_norm
from engine.parallel.layers import Remade, VocabParallelEmbedding, VocabParallelHead, embed, vocab_parameter
from engine.parallel.micro_batch import MicroBatch
from engine.parallel.sharding import Shard, make_parameter, whole

EMBEDDING = "model.embed_tokens.weight"


Residual = tuple[torch.Tensor, torch.Tensor | None]
"""The residual stream as a sum not yet made: the next norm makes it, in one kernel."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Takes and gives the residual stream as (x, branch), worth their
    sum [batch, seq or seq/tp, hidden]."""

    def __init__(self, layer: int, parts: Parts, index: int = 0) -> None:
        """`index` is its place in its stage: by that `parts.recompute` says what its backward pass makes again."""
        super().__init__()
        name = f"model.layers.{layer}"
        self.again = parts.recompute.whole(index)
        self.selective = parts.recompute.selective and not self.again
        self.attention_norm = make_norm(f"{name}.input_layernorm", parts)
        self.attention = Attention(f"{name}.self_attn", parts)
        self.mlp_norm = make_norm(f"{name}.post_attention_layernorm", parts)
        self.mlp = MLP(f"{name}.mlp", parts)

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None, micro: MicroBatch, rope: Rope,
                cache: LayerCache | None = None) -> Residual:
        if self.again and torch.is_grad_enabled():
            # The sum is made here, so that one tensor a block is kept and not two.
            return cast(Residual, checkpoint(self.run, sum_of(x, branch), None, micro, rope,
                                             use_reentrant=False, preserve_rng_state=False))
        return self.run(x, branch, micro, rope, cache)

    def run(self, x: torch.Tensor, branch: torch.Tensor | None, micro: MicroBatch, rope: Rope,
            cache: LayerCache | None = None) -> Residual:
        """The block itself; with --recompute full, what the backward pass runs again."""
        y, x = self.attention_norm.add(x, branch)
        branch = self.attention(y, micro, rope, cache, self._remade(self.attention_norm, x))
        y, x = self.mlp_norm.add(x, branch)
        return x, self.mlp(y, self._remade(self.mlp_norm, x))

    def _remade(self, norm: Norm, x: torch.Tensor) -> Remade | None:
        """How norm(x) is made again, if it is: the norm keeps x for its own backward pass."""
        return Remade(norm, x) if self.selective else None


def sum_of(x: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
    """The residual stream itself."""
    return x if branch is None else x + branch


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

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)  # [batch, seq or seq/tp, hidden]
        if self.positions is not None:
            first = self.tp.rank * x.shape[1] if self.tp.sequence else 0
            x = x + embed(positions[first : first + x.shape[1]], self.positions)
        return cast(torch.Tensor, x)


class Decoder(nn.Module):
    """Layers `layers` of the model, with the embedding if `first` and the final norm and head if `last`.

    Forward: token ids [batch, seq] on the first stage, activations [batch, seq or seq/tp, hidden] on the others; gives
    activations, normed for the head on the last stage. There `loss` makes losses and gradients of them, in one go and
    without ever holding all the logits, and `logits` the logits. `micro` says what the micro-batch is; without it, on
    the first stage, the token ids are all there is to say.
    """

    def __init__(self, parts: Parts, layers: Sequence[int], *, first: bool = True, last: bool = True) -> None:
        super().__init__()
        config = parts.config
        self.parts = parts
        self.first, self.last = first, last
        self.turned: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        head_name = EMBEDDING if config.tied else "lm_head.weight"
        weight = self._vocab(EMBEDDING, primary=True) if first else None
        self.embedding = Embedding(weight, parts) if weight is not None else None
        self.blocks = nn.ModuleList(Block(layer, parts, i) for i, layer in enumerate(layers))
        self.norm: Norm | None = make_norm("model.norm", parts) if last else None
        self.head: VocabParallelHead | None = None
        if last:
            shared = weight if config.tied and weight is not None else self._vocab(head_name, primary=not config.tied)
            self.head = VocabParallelHead(shared, parts.tp, config.vocab_size, parts.kernels.loss)

    def _vocab(self, name: str, primary: bool) -> nn.Parameter:
        parts = self.parts
        alone = self.first and self.last  # a tied weight is then one parameter, used twice; else two copies
        return vocab_parameter(
            name, parts.config.vocab_size, parts.padded_vocab, parts.config.hidden, std=parts.config.init_std,
            tp=parts.tp, tied=parts.config.tied and not alone, uses=2 if parts.config.tied and alone else 1,
            primary=primary, dtype=parts.dtype, device=parts.device)

    def forward(self, x: torch.Tensor, micro: MicroBatch | None = None,
                caches: Sequence[LayerCache] | None = None) -> torch.Tensor:
        micro = micro or MicroBatch.of(x)
        if self.embedding is not None:
            x = self.embedding(x, micro.positions)
        rope = self._rope(micro.positions)
        branch: torch.Tensor | None = None
        for i, block in enumerate(self.blocks):
            x, branch = block(x, branch, micro, rope, caches[i] if caches is not None else None)
        return sum_of(x, branch) if self.norm is None else self.norm.add(x, branch)[0]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, vocab/tp] of the last stage's activations [batch, seq or seq/tp, hidden]."""
        assert self.head is not None
        return cast(torch.Tensor, self.head(x))

    def loss(self, x: torch.Tensor, labels: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [batch * seq] of the last stage's activations, 0 where not supervised, and the gradient of
        `scale` times their sum for x; the head's own gradient goes to its bucket. labels [batch, seq]."""
        assert self.head is not None
        losses, grad = self.head.loss(x, labels, scale)
        assert grad is not None
        return losses, grad

    def losses(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same losses alone, for evaluation."""
        assert self.head is not None
        return self.head.loss(x, labels, None)[0]

    def _rope(self, positions: torch.Tensor) -> Rope:
        """The tables of sines and cosines; those of the last positions are kept, which the next micro-batch shares."""
        config = self.parts.config
        if config.family == "gpt2":
            return None
        if self.turned is None or self.turned[0] is not positions:
            self.turned = positions, rope_table(positions, config.head_dim, config.rope_theta, self.parts.dtype)
        return self.turned[1]

    def boundary(self, batch: int, seq: int) -> torch.Tensor:
        """Empty memory for an activation between stages: [batch, seq or seq/tp, hidden]."""
        parts = self.parts
        part = parts.tp.share(seq) if parts.tp.sequence else seq
        return torch.empty(batch, part, parts.config.hidden, dtype=parts.dtype, device=parts.device)


def stage_layers(layers: int, stages: int, head: float = 0.0) -> list[range]:
    """The layers of each stage: every stage has one, and the one with the most work has as little as can be. `head` is
    the work of the last stage's head, in layers.

    What does not divide falls to the first stages: their forward passes overlap with those of the stages after them.
    """
    others = max(1, stages - 1)

    def most(last: int) -> float:
        return max(last + head, -(-(layers - last) // others))

    last = layers if stages == 1 else min(range(layers - others, 0, -1), key=most)
    each, more = divmod(layers - last, others)
    sizes = [each + (stage < more) for stage in range(stages - 1)] + [last]
    bounds = [0, *accumulate(sizes)]
    return [range(low, high) for low, high in pairwise(bounds)]
