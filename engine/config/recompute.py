"""What the backward pass computes again instead of keeping it: `--recompute` in words and as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import UserError, shown

AUTO = "auto"
MOST_BLOCKS = 1 << 14
"""More than any model has (`check.MOST`): what `full` means in blocks."""


@dataclass(frozen=True)
class Recompute:
    """The first `blocks` blocks of a stage are run again as a whole. The others make again what costs next to nothing,
    the outputs of norms and of the MLP's activation, if `selective`, and keep everything else."""

    blocks: int = 0
    selective: bool = False

    @property
    def rung(self) -> int:
        """Its place among all, the least recomputation first."""
        return self.blocks + self.selective

    @classmethod
    def of_rung(cls, rung: int) -> Recompute:
        """The one in that place."""
        return cls(max(0, rung - 1), selective=rung > 0)

    def whole(self, index: int) -> bool:
        """Whether the block that is the `index`-th of its stage is run again as a whole."""
        return index < self.blocks

    def __str__(self) -> str:
        if not self.blocks:
            return "selective" if self.selective else "none"
        return "full" if self.blocks >= MOST_BLOCKS else f"full:{self.blocks}"


NONE = Recompute()
SELECTIVE = Recompute(selective=True)
FULL = Recompute(MOST_BLOCKS, selective=True)


def read_recompute(text: str) -> Recompute:
    """The value of `--recompute`. Raises UserError for what is none, and ValueError for `auto`, which a plan has to
    turn into one first (`engine.plan.least_recompute`)."""
    if text == AUTO:
        raise ValueError("--recompute auto has not been decided yet")
    for known in (NONE, SELECTIVE, FULL):
        if text == str(known):
            return known
    blocks = re.fullmatch(r"full:([0-9]{1,5})", text)
    if blocks is None:
        raise UserError(f"--recompute {shown(text, 80)!r} is not known; use none, selective, full, full:N or auto")
    if not 1 <= int(blocks[1]) <= MOST_BLOCKS:
        raise UserError(f"--recompute {text}: N is a number of blocks, from 1 to {MOST_BLOCKS}; use --recompute "
                        "selective for none of them")
    return Recompute(int(blocks[1]), selective=True)
