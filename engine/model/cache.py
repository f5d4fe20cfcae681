"""Keys and values of the tokens already seen, for generation."""

from __future__ import annotations

import torch


class LayerCache:
    """One layer's keys and values, [batch, kv_heads, tokens so far, head_dim]."""

    def __init__(self) -> None:
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the new tokens' keys and values and returns all of them."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return 0 if self.k is None else self.k.shape[2]
