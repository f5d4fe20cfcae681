"""The documents packed into a batch's rows, as the kernels read them: made once, read by every layer both ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.attention.bounds import document_bounds


@dataclass(frozen=True)
class Documents:
    """Of each token, flattened [batch * seq] int32: where its document begins in its row, and one past its end."""

    start: torch.Tensor
    end: torch.Tensor

    @classmethod
    def of(cls, cumulative: torch.Tensor, batch: int, seq: int) -> Documents:
        """From cumulative lengths [documents + 1] over the flattened batch, as `document_bounds` reads them."""
        return cls(*document_bounds(cumulative, batch, seq))
