"""One micro-batch: all that the stages of a pipeline are told of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.attention.documents import Documents


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch is, the same on every rank that works on it.

    tokens, labels [sequences, seq], int64; labels are None where no loss is computed.
    positions [seq], int64: where each token stands in its sequence.
    documents: those that attention keeps within, made once for all layers; None where it does not.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor | None = None
    documents: Documents | None = None

    @classmethod
    def of(cls, tokens: torch.Tensor, *, first: int = 0, documents: torch.Tensor | None = None) -> MicroBatch:
        """Tokens at the positions first, first + 1, ..., without labels. documents [documents + 1], int32: cumulative
        lengths over the flattened tokens."""
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        return cls(tokens, positions, documents=None if documents is None else Documents.of(documents, *tokens.shape))
