"""One micro-batch: all that the stages of a pipeline are told of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch is, the same on every rank that works on it.

    tokens, labels [sequences, seq], int64; labels are None where no loss is computed.
    positions [seq], int64: where each token stands in its sequence.
    documents [documents + 1], int32: the cumulative lengths, over the flattened tokens, of the documents that attention
    keeps within; None where it does not.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    @classmethod
    def of(cls, tokens: torch.Tensor, *, first: int = 0, documents: torch.Tensor | None = None) -> MicroBatch:
        """Tokens at the positions first, first + 1, ..., without labels."""
        return cls(tokens, torch.arange(first, first + tokens.shape[1], device=tokens.device), documents=documents)
