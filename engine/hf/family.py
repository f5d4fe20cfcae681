"""What a model family is to the converter: its config both ways, and which tensors an HF folder of it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig
from engine.hf.keys import Keys
from engine.model.shapes import Shapes, logical_shapes


@dataclass(frozen=True)
class Held:
    """A tensor of an HF folder: the logical tensors it stacks along dim 0, stored transposed or not."""

    parts: tuple[str, ...]
    transpose: bool = False

    def shape(self, logical: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape in the file, given the shapes of the logical tensors."""
        stacked = (sum(logical[part][0] for part in self.parts), *logical[self.parts[0]][1:])
        return stacked[::-1] if self.transpose else stacked


@dataclass(frozen=True)
class Spot:
    """Where a logical tensor stands: in HF tensor `name`, from row `row` on (of the transposed one if `transpose`)."""

    name: str
    row: int
    transpose: bool


@dataclass(frozen=True)
class Family:
    """One family of models on the Hugging Face side."""

    model_types: tuple[str, ...]
    """The `model_type`s it reads."""
    from_hf: Callable[[Keys], ModelConfig]
    """The ModelConfig of a config.json."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that describe the network; UserError for one that no HF class can hold."""
    tensors: Callable[[ModelConfig], dict[str, Held]]
    """HF name -> what it holds, in the order of the file."""
    canonical: Callable[[str], str] = str
    """The name of a tensor as save_pretrained writes it, from the spellings found in older files."""
    ignored: re.Pattern[str] = re.compile(r"(?!)")
    """Tensors of older files that are no weights (masks, rotary tables)."""
    unused: frozenset[str] = frozenset()
    """Fields of ModelConfig that the family does not compute with; every other one must come back as it went."""


def spots(family: Family, config: ModelConfig) -> dict[str, Spot]:
    """Logical name -> where it stands."""
    logical: Shapes = logical_shapes(config)
    found = {}
    for name, held in family.tensors(config).items():
        row = 0
        for part in held.parts:
            found[part] = Spot(name, row, held.transpose)
            row += logical[part][0]
    return found
