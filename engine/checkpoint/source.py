"""Weights by logical name, wherever they come from: a step folder or a Hugging Face folder, read by rectangles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from engine.checkpoint.dtypes import dtype_name
from engine.checkpoint.slices import Entry, Shape
from engine.errors import UserError


class TensorSource(Protocol):
    """Tensors under their logical names."""

    @property
    def place(self) -> str:
        """Where they come from, for messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name -> whole shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""

    def read(self, name: str, start: Shape, extent: Shape) -> torch.Tensor:
        """The rectangle [start, start + extent); it may be a view of a file, so it must not be changed."""


def load_weights(source: TensorSource, entries: Iterable[Entry], expected: Mapping[str, Shape]) -> None:
    """Fills every entry of kind "model" or "master" in place from the source's weights, casting where dtypes differ.

    `expected`: all logical names and shapes of the model, also those of other ranks. UserError names every tensor that
    is missing, extra or of another shape.
    """
    match_names(source.place, source.shapes, expected)
    for entry in entries:
        if entry.kind in ("model", "master"):
            entry.tensor.detach().copy_(source.read(entry.piece.member.name, entry.piece.start, entry.piece.extent))


def match_names(place: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """UserError unless `found` has exactly the expected names and shapes; it names all that differ."""
    faults = []
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        faults.append(f"lacks {compress(missing)}")
    if extra:
        faults.append(f"has {compress(extra)}, which the model does not")
    shaped: dict[tuple[Shape, Shape], list[str]] = {}
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            shaped.setdefault((tuple(found[name]), tuple(shape)), []).append(name)
    faults += [f"has {compress(names)} of shape {list(have)}, and the model wants {list(want)}"
               for (have, want), names in shaped.items()]
    if faults:
        raise UserError(f"{place} does not fit the model: it {'; it '.join(faults)}")


def match_dtypes(place: str, pairs: Iterable[tuple[str, torch.dtype, torch.dtype]]) -> None:
    """UserError unless in each (name, found, wanted) the two dtypes agree; it names all that differ."""
    differ: dict[tuple[str, str], list[str]] = {}
    for name, found, wanted in pairs:
        if found != wanted:
            differ.setdefault((dtype_name(found), dtype_name(wanted)), []).append(name)
    if differ:
        faults = [f"{compress(names)} as {have}, which this run holds as {want}"
                  for (have, want), names in differ.items()]
        raise UserError(f"{place} holds {'; '.join(faults)}; use the --dtype it was saved with, or --load, which takes "
                        "the weights alone and converts them")


def compress(names: Iterable[str]) -> str:
    """All names in one line, numbers folded: `model.layers.{0-3,7}.mlp.up_proj.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d{1,9})(\..*)", name, re.DOTALL)
        key, number = ((match[1], match[3]), int(match[2])) if match else ((name, ""), -1)
        groups.setdefault(key, []).append(number)
    return ", ".join(a if numbers == [-1] else f"{a}{{{_ranges(numbers)}}}{b}" for (a, b), numbers in groups.items())


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` of whole numbers."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
