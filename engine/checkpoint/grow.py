"""A source whose vocabulary has more rows than its files: what a tokenizer with more pieces asks of a loaded model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch

from engine.checkpoint.slices import Shape
from engine.checkpoint.source import TensorSource

CHUNK = 4096
"""Rows read at a time for the mean: fixed, so that every layout and every file format adds in the same order."""


class GrownSource:
    """`source` with `rows` rows in the matrices `names`; each new row is the mean of the old ones.

    A new piece then starts as an average one, as likely as the others; of a random row the logits would be off.
    The mean is a function of the files alone (summed in float64, rounded once), so every layout loads the same bits.
    """

    def __init__(self, source: TensorSource, rows: int, names: Collection[str]) -> None:
        self.place = source.place
        self.shapes: Mapping[str, Shape] = {name: (rows, *shape[1:]) if name in names else shape
                                            for name, shape in source.shapes.items()}
        self._source = source
        self._means: dict[str, torch.Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        return self._source.dtype(name)

    def read(self, name: str, start: Shape, extent: Shape) -> torch.Tensor:
        """The rectangle [start, start + extent) of a tensor."""
        held = max(0, min(extent[0], self._source.shapes[name][0] - start[0]))
        if held == extent[0]:
            return self._source.read(name, start, extent)
        mean = self._mean(name)[start[1] : start[1] + extent[1]].expand(extent[0] - held, -1)
        return torch.cat([self._source.read(name, start, (held, *extent[1:])), mean]) if held else mean

    def _mean(self, name: str) -> torch.Tensor:
        """The mean of a matrix' rows [columns], in its own number format."""
        if name not in self._means:
            rows, columns = self._source.shapes[name]
            total = np.zeros(columns)
            for low in range(0, rows, CHUNK):
                part = self._source.read(name, (low, 0), (min(CHUNK, rows - low), columns))
                total += part.double().numpy().sum(axis=0)  # numpy: torch's order depends on its threads
            self._means[name] = torch.from_numpy(total / rows).to(self.dtype(name))
        return self._means[name]


def grown(source: TensorSource, expected: Mapping[str, Shape], names: Collection[str]) -> TensorSource:
    """`source` itself, or where the model expects more rows of the matrices `names`, with these."""
    held = {source.shapes[name][0] for name in names if name in source.shapes}
    rows = {expected[name][0] for name in names if name in expected}
    if len(rows) == len(held) == 1 and max(rows) > max(held):
        return GrownSource(source, max(rows), [name for name in names if name in source.shapes])
    return source
