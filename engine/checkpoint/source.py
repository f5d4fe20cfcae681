"""Weights by logical name, wherever they come from: a step folder or a Hugging Face folder, read by rectangles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from engine.checkpoint.dtypes import dtype_name
from engine.checkpoint.slices import Entry, Shape
from engine.errors import UserError, shown

PART = 1 << 22
"""Elements looked at at once."""
LOOKED_AT = 100_000
"""Names that are folded; a file may hold any number."""
GROUPS = 24
"""Names a message lists, those that differ by a number counted as one: more than a whole model of ours has."""


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
    filled = [entry for entry in entries if entry.kind in ("model", "master")]
    for entry in filled:
        entry.tensor.detach().copy_(source.read(entry.piece.member.name, entry.piece.start, entry.piece.extent))
    refuse_nonfinite(source.place, filled)


def refuse_nonfinite(place: str, entries: Iterable[Entry]) -> None:
    """UserError where tensors that were filled from `place` hold NaN or infinity; it names them."""
    wrong = sorted({entry.piece.member.name if entry.kind in ("model", "master") else entry.name
                    for entry in entries if not all_finite(entry.tensor)})
    if wrong:
        raise UserError(f"{shown(place)} holds NaN, infinity, or values beyond the number format of this run in "
                        f"{compress(wrong)}; such a model computes nothing: take another checkpoint, or find out what "
                        "wrote this one")


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; by parts, since torch's own test makes copies of what it is given."""
    values = tensor.detach().reshape(-1)
    found = torch.ones((), dtype=torch.bool, device=tensor.device)
    for part in values.split(PART):
        found &= torch.isfinite(part).all()
    return bool(found)


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
    """Names in one line, numbers folded: `model.layers.{0-3,7}.mlp.up_proj.weight`; the first GROUPS of them."""
    groups: dict[tuple[str, str], list[int]] = {}
    names = list(names)
    for name in names[:LOOKED_AT]:
        match = re.fullmatch(r"(.*?\.)(\d{1,9})(\..*)", name, re.DOTALL)
        key, number = ((match[1], match[3]), int(match[2])) if match else ((name, ""), -1)
        groups.setdefault(key, []).append(number)
    words = [a if numbers == [-1] else f"{a}{_ranges(numbers)}{b}" if len(set(numbers)) == 1 else
             f"{a}{{{_ranges(numbers)}}}{b}" for (a, b), numbers in groups.items()]
    unseen = max(0, len(words) - GROUPS) + max(0, len(names) - LOOKED_AT)
    more = f" and {unseen:,} more" if unseen else ""
    return ", ".join(shown(word, 100) for word in words[:GROUPS]) + more


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` of whole numbers."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
