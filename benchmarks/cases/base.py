"""A case: one launcher at one real shape, with the bytes and operations it cannot do without, and its peers.

The same cases are timed on a GPU (`benchmarks/kernels.py`) and compiled without one (`benchmarks/resources.py`, where
the tensors are on the meta device and launches only compile). Each file has them twice: `CASES` at real shapes, and
`TINY` with the widths that choose a kernel's configuration but few rows, for tools that slow a kernel down
(`benchmarks/sanitize.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

TOKENS, FEW = 8192, 7
"""Rows of a case at a real shape, and of a tiny one: an odd number, so that the last tile is cut."""

Run = Callable[[], Any]
Build = Callable[[torch.device], Run | None]
"""Makes the inputs on a device and gives what is timed; None where a peer is not installed or cannot run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run and what it is measured against."""

    kernel: str
    """Name in the table of targets: `rms_norm forward`."""
    shape: str
    """As a reader would say it: `8192 x 4096`."""
    dtype: str
    """bf16, fp16 or fp32."""
    build: Build
    """Inputs and the call of our launchers. It reads no tensor's values, so that meta tensors pass."""
    bytes: int = 0
    """Least traffic to and from memory."""
    flops: int = 0
    """Operations of the matrix products."""
    matmul: bool = False
    """The kernel multiplies matrices: on Hopper its machine code must hold HGMMA."""
    target: float = 0.0
    """Share of the floor's rate it is to reach."""
    peers: dict[str, Build] = field(default_factory=dict)
    """Name -> the same work by others."""
