"""Our collectives through shared memory beside gloo's over loopback TCP: the same ranks, in turns, fp32.

A row is one operation on a message of that size (of the whole message, for reduce-scatter and all-gather), the median
over rounds of the slowest rank's time.

    python benchmarks/collectives.py [--rounds 7] [--worlds 2,4] [--save]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from common import keep, table

if TYPE_CHECKING:
    import torch

    from engine.comm.comm import Comm

SIZES = {"4 KB": 1 << 12, "2 MB": 1 << 21, "32 MB": 1 << 25}
BYTES_A_TURN = 1 << 26
"""Small messages are repeated until a turn is long enough to measure, at most 100 times."""


def measure(rank: int, world: int, rounds: int, store: str, pipe: Connection) -> None:
    """One rank: times every operation and size with both transports; rank 0 sends the rows."""
    import torch
    import torch.distributed as dist

    from engine.config import Layout
    from engine.mesh import build_mesh

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {name: build_mesh(Layout(dp=world), rank, 1, timedelta(seconds=120), shared=name == "shared").group("dp")
              for name in ("gloo", "shared")}
    rows: list[dict[str, Any]] = []
    for size, count in SIZES.items():
        flat = torch.randn(count // 4)
        part = torch.empty(count // 4 // world)
        repeats = max(2, min(100, BYTES_A_TURN // count))
        for operation in ("all_reduce", "reduce_scatter", "all_gather"):
            times: dict[str, list[float]] = {name: [] for name in groups}
            for _ in range(rounds + 1):  # the first warms up
                for name, group in groups.items():
                    assert group is not None
                    flat.fill_(1.0)
                    dist.barrier()
                    start = time.perf_counter()
                    for _ in range(repeats):
                        act(group, operation, flat, part)
                    took = torch.tensor((time.perf_counter() - start) / repeats)
                    dist.all_reduce(took, op=dist.ReduceOp.MAX)
                    times[name].append(float(took))
            rows.append({"ranks": world, "operation": operation, "size": size,
                         **{name: taken[1:] for name, taken in times.items()}})
    if rank == 0:
        pipe.send(rows)
    dist.barrier()
    dist.destroy_process_group()


def act(group: Comm, operation: str, flat: torch.Tensor, part: torch.Tensor) -> None:
    """One collective, to its end."""
    if operation == "all_reduce":
        group.all_reduce_(flat)
    elif operation == "reduce_scatter":
        group.start_reduce_scatter(part, flat).wait()
    else:
        group.start_all_gather(flat, part).wait()


def race(world: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of a number of ranks."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=measure, args=(rank, world, rounds, f"{folder}/store", there), daemon=True)
                 for rank in range(world)]
        for rank in ranks:
            rank.start()
        rows: list[dict[str, Any]] = here.recv()
        for rank in ranks:
            rank.join()
    return rows


def main() -> None:
    """Runs the race and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks, comma separated")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/collectives.json")
    args = parser.parse_args()
    rows = [row for world in args.worlds.split(",") for row in race(int(world), args.rounds)]
    lines = [["", "ranks", "gloo ms", "shared ms", "ratio"]]
    for row in rows:
        row["ratio"] = statistics.median(a / b for a, b in zip(row["gloo"], row["shared"], strict=True))
        lines.append([f"{row['operation']} {row['size']}", str(row["ranks"]),
                      *(f"{1000 * statistics.median(row[name]):.3f}" for name in ("gloo", "shared")),
                      f"{row['ratio']:.1f}"])
    print(table(lines))
    if args.save:
        print(keep("collectives", {"rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
