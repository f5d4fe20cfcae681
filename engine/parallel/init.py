"""Initial weights as a pure function of (seed, logical name, position): every layout starts from the same bits.

Element i of a logical tensor is normal number i of a stream: Philox-4x64 (Salmon et al., SC 2011), keyed by the seed
and a hash of the name, its counter i // 4; lanes 2j and 2j + 1 make two normals by Box and Muller (1958) in float64 on
the CPU, rounded once to the parameter's dtype. Padding rows are zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from engine.parallel.sharding import Member, shard_of

LANES = 4
"""Numbers Philox-4x64 makes from one value of its counter."""
CHUNK = 1 << 20
"""Elements made at a time; bounds the float64 memory, a multiple of LANES."""


def normals(seed: int, name: str, low: int, high: int) -> np.ndarray:
    """Elements [low, high) of the standard normal stream of (seed, name), float64."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    first = low // LANES
    blocks = -(-high // LANES) - first
    philox = np.random.Philox(key=[seed & (2**64 - 1), int.from_bytes(digest, "little")], counter=[first, 0, 0, 0])
    raw = philox.random_raw(blocks * LANES).reshape(-1, 2)
    # 53 bits, shifted by half a step into the open interval (0, 1): the logarithm never sees 0.
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return both[low - first * LANES : high - first * LANES]


def _rectangle(seed: int, member: Member) -> Iterable[tuple[slice, np.ndarray]]:
    """Local row ranges of a member with their values, a bounded number of elements at a time."""
    width = member.shape[1] if len(member.shape) > 1 else 1
    column = member.start[1] if len(member.shape) > 1 else 0
    columns = member.extent[1] if len(member.shape) > 1 else 1
    rows = 1 if columns < width else max(1, CHUNK // width)
    for row in range(0, member.extent[0], rows):
        count = min(rows, member.extent[0] - row)
        low = (member.start[0] + row) * width + column
        values = normals(seed, member.name, low, low + (count - 1) * width + columns)
        yield slice(member.row + row, member.row + row + count), values.reshape(count, columns)


def initialize(parameter: torch.Tensor, seed: int) -> None:
    """Fills a parameter from its shard's description."""
    shard = shard_of(parameter)
    with torch.no_grad():
        if shard.fill is not None:
            parameter.fill_(shard.fill)
            return
        parameter.zero_()
        for member in shard.members:
            for rows, values in _rectangle(seed, member):
                parameter[rows].copy_(torch.from_numpy(values * shard.std).view_as(parameter[rows]))
