"""Initial weights as a pure function of (seed, logical name, position): every layout starts from the same bits.

Element i of a logical tensor is normal number i of a stream: Philox-4x64 (Salmon et al., SC 2011), keyed by the seed
and a hash of the name, its counter i // 4; lanes 2j and 2j + 1 make two normals by Box and Muller (1958) in float64 on
the CPU, rounded once to the parameter's dtype. Padding rows are zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from engine.parallel.sharding import Member, shard_of

LANES = 4
"""Numbers Philox-4x64 makes from one value of its counter."""
CHUNK = 1 << 15
"""Elements made at a time by one thread: it bounds the float64 memory, and is too small for torch to start threads."""


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


def _row_ranges(member: Member) -> Iterator[tuple[int, int]]:
    """Ranges of a member's rows, about CHUNK elements each; single rows where it holds a part of the columns."""
    width = member.shape[1] if len(member.shape) > 1 else 1
    rows = max(1, CHUNK // width) if member.extent[1:] == member.shape[1:] else 1
    for low in range(0, member.extent[0], rows):
        yield low, min(low + rows, member.extent[0])


def _fill(parameter: torch.Tensor, seed: int, std: float, member: Member, rows: tuple[int, int]) -> None:
    """Writes the values of a range of a member's rows into the local parameter."""
    width = member.shape[1] if len(member.shape) > 1 else 1
    column, columns = (member.start[1], member.extent[1]) if len(member.shape) > 1 else (0, 1)
    first = (member.start[0] + rows[0]) * width + column
    values = normals(seed, member.name, first, first + (rows[1] - rows[0] - 1) * width + columns) * std
    target = parameter[member.row + rows[0] : member.row + rows[1]]
    target.copy_(torch.from_numpy(values).view_as(target))


def initialize(parameter: torch.Tensor, seed: int) -> None:
    """Fills a parameter from its shard's description, on as many threads as torch uses."""
    shard = shard_of(parameter)
    parameter = parameter.detach()
    if shard.fill is not None:
        parameter.fill_(shard.fill)
        return
    parameter.zero_()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for member in shard.members:
            jobs = (pool.submit(_fill, parameter, seed, shard.std, member, rows) for rows in _row_ranges(member))
            for job in list(jobs):
                job.result()
