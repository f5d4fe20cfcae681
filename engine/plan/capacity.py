"""How much memory a rank's device has, and how much of it a run may plan with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import Layout
from engine.plan.units import bytes_text

# The margin of a GPU. No GPU has run Triax yet: these are figures of the libraries' sources and of others' runs.
CONTEXT = 800 * 10**6
"""Bytes of a GPU that torch's allocator never sees: the CUDA context with the code of torch, cuBLAS, NCCL and Triton's
kernels takes 0.5 to 0.6 GB on Hopper; cuBLAS has 32 MiB of workspace a handle and stream."""
COMMUNICATOR = 350 * 10**6
"""Bytes of a GPU that NCCL takes for each group of ranks it serves: buffers of 9.6 MB a connection (4.2 MB for its
simple protocol, 4.9 for LL128, 0.5 for LL: NCCL's src/init.cc), some 16 channels, on each a ring and a tree."""
FRAGMENTATION = 0.02
"""Share of a GPU that torch's allocator holds and cannot give. With expandable segments (engine/train/launch.py asks
for them) blocks lie in one range that grows by 20 MiB; the gaps between tensors of unlike sizes are left."""


@dataclass(frozen=True)
class Capacity:
    """The memory that one rank has. `what` reads as the subject of "has": "this machine", "each GPU (NVIDIA L4)"; on a
    `gpu` a run may plan with less than the total."""

    what: str
    total: int
    gpu: bool = False
    main: int | None = None
    """Bytes of main memory that the rank of a GPU can take; None where that is not known."""

    def usable(self, layout: Layout) -> int:
        """Bytes that a run in this layout may plan with."""
        if not self.gpu:
            return self.total
        return max(0, int(self.total * (1 - FRAGMENTATION)) - _beside(layout))

    def text(self, layout: Layout) -> str:
        """What it has, and on a GPU how much of it is kept free and what for: "each GPU has 85.0 GB, 82.1 GB .."."""
        if not self.gpu:
            return f"{self.what} has {bytes_text(self.total)}"
        return (f"{self.what} has {bytes_text(self.total)}, {bytes_text(self.usable(layout))} of it for the run "
                f"(kept free: {margin_text(layout)})")


def capacity_of(device: torch.device, local_ranks: int) -> Capacity:
    """A rank's GPU, or its share of the main memory that is free now: on CPU the cgroup's limit counts where there is
    one (containers)."""
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
        return Capacity(f"each GPU ({torch.cuda.get_device_name(device)})", total, gpu=True,
                        main=main_memory() // max(1, local_ranks))
    what = f"this machine, shared by {local_ranks} processes," if local_ranks > 1 else "this machine"
    return Capacity(what, main_memory() // max(1, local_ranks))


def gpu_that_holds(need: int, layout: Layout) -> int:
    """Bytes that a GPU must have to hold a rank that needs `need`, the margin included."""
    return int((need + _beside(layout)) / (1 - FRAGMENTATION)) + 1


def margin_text(layout: Layout) -> str:
    """What a GPU's margin is for: "0.8 GB for the CUDA context, .."."""
    nccl = _communicators(layout) * COMMUNICATOR
    buffers = f"{bytes_text(nccl)} for NCCL's buffers, " if nccl else ""
    return f"{bytes_text(CONTEXT)} for the CUDA context, {buffers}{FRAGMENTATION:.0%} for fragmentation"


def _beside(layout: Layout) -> int:
    """Bytes of a GPU that are not torch's allocator's."""
    return CONTEXT + _communicators(layout) * COMMUNICATOR


def _communicators(layout: Layout) -> int:
    """How many groups of ranks NCCL serves on the rank that is in most of them: the world, one an axis (stages have
    none), and a channel each way to both neighbouring stages (engine/mesh.py)."""
    if layout.world == 1:
        return 0
    axes = sum(size > 1 for size in (layout.dp, layout.cp, layout.tp))
    return 1 + axes + 2 * min(2, layout.pp - 1)


def main_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process and its children can still take; `root` is where /proc and /sys hang."""
    free = _machine_free(root / "proc/meminfo")
    found = [_cgroup_free(folder, *names) for folder, *names in _cgroups(root)]
    return min([free, *(left for left in found if left is not None)])


def _machine_free(meminfo: Path) -> int:
    """MemAvailable, or where the system does not say, all pages there are."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """This process's memory groups and their parents, with the names of their limit, usage and statistics (v2, v1)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):
            yield base / part, *names


def _cgroup_free(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """What is left under a group's limit; file pages not in use are taken back when needed, so they count as free."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # "max": no limit
        return None
    return max(0, int(most) - used + int(statistics.get(cache, 0)))
