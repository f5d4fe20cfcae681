"""What one rank finds wrong, all ranks raise: without that, the others would wait for it in the next collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from engine.errors import LONGEST, UserError
from engine.mesh import Mesh

T = TypeVar("T")


def agreed(work: Callable[[], T], mesh: Mesh, device: torch.device) -> T:
    """The result of `work`, called by every rank. Where it raises UserError on any rank, every rank raises what the
    first of these has said: files may be damaged in the part that one rank reads."""
    error: UserError | None = None
    try:
        result = work()
    except UserError as caught:
        error = caught
    world = mesh.group("world")
    if world is None:
        if error is not None:
            raise error
        return result
    place = torch.tensor(0 if error is None else world.size - world.rank, dtype=torch.int64, device=device)
    world.all_reduce_(place, "max")
    if not int(place):
        return result
    first = world.size - int(place)
    letters = torch.zeros(LONGEST, dtype=torch.int64, device=device)
    if world.rank == first:
        numbers = torch.tensor([ord(letter) for letter in str(error)[:LONGEST]], device=device)
        letters[: len(numbers)] = numbers
    world.all_reduce_(letters)
    said = "".join(chr(number) for number in letters.tolist() if number)
    raise UserError(said if first == 0 else f"rank {first}: {said}") from error
