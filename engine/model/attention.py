"""Causal self-attention with grouped queries; heads are split over the tensor axis."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.attention import attention
from engine.kernels.rope import rope_split
from engine.model.cache import LayerCache
from engine.model.parts import Parts, RMSNorm
from engine.parallel.layers import ColumnParallelLinear, Remade, RowParallelLinear
from engine.parallel.micro_batch import MicroBatch
from engine.parallel.sharding import Member, split_rows

Rope = tuple[torch.Tensor, ...] | None


class Attention(nn.Module):
    """Queries, keys and values in one projection, stacked per rank as [q; k; v]."""

    def __init__(self, name: str, parts: Parts) -> None:
        super().__init__()
        config, tp = parts.config, parts.tp
        self.kernels = parts.kernels
        self.head_dim = config.head_dim
        self.heads = tp.share(config.heads)
        self.kv_heads = max(1, tp.share(config.kv_heads))
        self.qkv = ColumnParallelLinear(
            _stack(name, "weight", parts, (config.hidden,)), _stack(name, "bias", parts, ()) if config.qkv_bias else (),
            inputs=config.hidden, std=config.init_std, tp=tp, dtype=parts.dtype, device=parts.device)
        self.out = RowParallelLinear(
            f"{name}.o_proj", config.heads * config.head_dim, config.hidden, bias=config.out_bias,
            std=parts.residual_std, tp=tp, dtype=parts.dtype, device=parts.device)
        # Each rank normalises its own heads, so these gradients are always partial over tp.
        self.q_norm = RMSNorm(f"{name}.q_norm", config.head_dim, parts, partial=True) if config.qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", config.head_dim, parts, partial=True) if config.qk_norm else None

    def forward(self, x: torch.Tensor, micro: MicroBatch, rope: Rope, cache: LayerCache | None = None,
                remade: Remade | None = None) -> torch.Tensor:
        qkv = self.qkv(x, remade)
        batch, seq, _ = qkv.shape
        qkv = qkv.view(batch, seq, -1, self.head_dim)  # [batch, seq, (heads + 2 kv_heads) / tp, head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=2)
        if rope is not None:
            q, k, v = rope_split(  # [batch, heads/tp, seq, head_dim]
                qkv, *rope, self.heads, self.kv_heads, by=self.kernels.rope)
        else:
            q, k, v = qkv.transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(  # [batch, heads/tp, seq, head_dim]
            q, k, v, cumulative=micro.documents, by=self.kernels.attention)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]


def _stack(name: str, kind: str, parts: Parts, columns: tuple[int, ...]) -> tuple[Member, ...]:
    """Members of the fused projection. When tp exceeds kv_heads, `tp / kv_heads` adjacent ranks hold the same kv head:
    one of them is primary, and the gradient each computes (for its own queries) is a part of the sum over them."""
    config, tp = parts.config, parts.tp
    replicas = max(1, tp.size // config.kv_heads)
    members: list[Member] = []
    row = 0
    for proj, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads), ("v_proj", config.kv_heads)):
        copies = 1 if proj == "q_proj" else replicas
        members.append(split_rows(
            f"{name}.{proj}.{kind}", (heads * config.head_dim, *columns), tp.rank // copies, tp.size // copies,
            row=row, primary=tp.rank % copies == 0, partial="kv" if copies > 1 else None))
        row += members[-1].rows
    return tuple(members)
