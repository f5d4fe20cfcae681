"""Every fused kernel at real shapes on a CUDA GPU: its time, its share of what the GPU can do, and its peers'.

    python benchmarks/kernels.py [--only norm "AdamW"] [--peers eager,sdpa] [--rounds 7] [--budget 480]
                                 [--save [FOLDER]] [--profile]

In every round of a case our kernel, its peers and the floor's two measures (a copy of 1 GiB, a bf16 product of 8192^3)
take a turn. A turn is the median of some calls between CUDA events, each call behind a write over the whole L2 cache
and a pause in which the host gets ahead: what is timed is the GPU's work. Figures are medians over rounds.

Most of the time goes into compiling peers, 5 to 15 s for each by torch.compile: --peers leaves others than those named
out. Without CUDA it says so and exits 2. A peer that is not here or fails is shown as "-" with its reason; where one of
our own kernels fails, the rest is still measured and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pkgutil
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import cases
import torch
from cases.base import Build, Case, Run
from common import RESULTS, keep, machine, table
from rows import OURS, Row, Side, lines, plot, write_csv

COPY = 1 << 30
PRODUCT = 8192
PAUSE = 2_000_000
"""Clock cycles, about a millisecond, in which the host queues a call before the GPU comes to it."""
TURN = 0.02
"""Seconds of calls in a turn, between 3 and 20 calls."""


class Meter(Protocol):
    """What times; tests have one of their own."""

    def seconds(self, run: Run) -> float:
        """Of one call."""

    def extra(self, run: Run) -> int:
        """Bytes that a call holds at its peak beyond those held before it."""


class CudaMeter:
    """CUDA events and PyTorch's allocator."""

    def __init__(self) -> None:
        # Twice the cache, so that nothing of it stays.
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.int8, device="cuda")

    def seconds(self, run: Run) -> float:
        calls = int(TURN / max(self._queue(run, 1)[0], 1e-9))
        return statistics.median(self._queue(run, max(3, min(20, calls))))

    def _queue(self, run: Run, calls: int) -> list[float]:
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
        for start, end in zip(starts, ends, strict=True):
            self.flush.zero_()
            torch.cuda._sleep(PAUSE)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]

    def extra(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def floors(device: torch.device) -> tuple[Run, Run]:
    """The copy and the matrix product that a case is held against."""
    source, target = (torch.empty(COPY, dtype=torch.int8, device=device) for _ in range(2))
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).bfloat16() for _ in range(2))
    return lambda: target.copy_(source), lambda: a @ b


def measure(family: str, case: Case, meter: Meter, rounds: int, floor: tuple[Run, Run], device: torch.device,
            commit: str) -> Row:
    """Lets all sides of a case take turns. An error is kept as the reason why a side has no figures."""
    row = Row(family, case.kernel, case.shape, case.dtype, case.bytes, case.flops, case.target, commit, [Side(OURS)])
    turns = [(row.ours, _ready(row.ours, case.build, meter, device))]
    if not row.ours.why:
        row.sides += [Side(name) for name in case.peers]
        turns += [(side, _ready(side, case.peers[side.name], meter, device)) for side in row.sides[1:]]
    copy, product = Side("copy"), Side("product")
    turns += [(copy, floor[0] if case.bytes else None), (product, floor[1] if case.flops else None)]
    for _ in range(rounds if not row.ours.why else 0):
        for side, run in turns:
            if run is not None and not side.why:
                _turn(side, run, meter)
    row.ours.why = row.ours.why or copy.why or product.why  # a floor that fails has lost the GPU
    if row.ours.why:
        del row.sides[1:]
    else:
        row.copy_rate = 2 * COPY / copy.median if case.bytes else 0.0
        row.product_rate = 2 * PRODUCT**3 / product.median if case.flops else 0.0
    return row


def _ready(side: Side, build: Build, meter: Meter, device: torch.device) -> Run | None:
    """Builds a side and warms it up: what compiles does so here. Anything may be wrong in a peer; it ends that peer's
    figures and nothing else."""
    try:
        run = build(device)
        if run is None:
            side.why = "not installed, or cannot run here"
            return None
        run()
        side.extra = meter.extra(run)
        return run
    except Exception as error:
        side.why = _one_line(error)
        return None


def _turn(side: Side, run: Run, meter: Meter) -> None:
    try:
        side.seconds.append(meter.seconds(run))
    except Exception as error:
        side.why = _one_line(error)
        side.seconds.clear()


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:100]}" if text else type(error).__name__


def _forget() -> None:
    """Gives back what a case held, and what torch's compiler knows: it stops compiling a function after 8 variants,
    and cases make variants of one."""
    gc.collect()
    torch._dynamo.reset()
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        pass  # an invalid access has lost the GPU: every case from here on says so


def picked(only: Sequence[str]) -> list[tuple[str, Case]]:
    """(family, case) of every case, or of those whose file or kernel is named."""
    families = [info.name for info in pkgutil.iter_modules(cases.__path__) if info.name != "base"]
    found = [(family, case) for family in sorted(families) for case in cases.all_cases([family])]
    known = {family for family, _ in found} | {case.kernel for _, case in found}
    unknown = sorted(set(only) - known)
    if unknown:
        raise SystemExit(f"no cases named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [(family, case) for family, case in found if not only or family in only or case.kernel in only]


def with_peers(todo: Sequence[tuple[str, Case]], words: str) -> list[tuple[str, Case]]:
    """The cases with those of their peers whose names hold one of the words (joined by commas); `all` keeps all."""
    asked = [word.strip().lower() for word in words.split(",") if word.strip()]
    if asked == ["all"]:
        return list(todo)
    names = sorted({name for case in cases.all_cases() for name in case.peers})
    unknown = [word for word in asked if not any(word in name.lower() for name in names)]
    if unknown or not asked:
        raise SystemExit(f"no peers named {', '.join(unknown) or repr(words)}; there are all: {', '.join(names)}")
    return [(family, replace(case, peers={name: build for name, build in case.peers.items()
                                          if any(word in name.lower() for word in asked)})) for family, case in todo]


def within(budget: float, todo: Sequence[tuple[str, Case]],
           clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[str, Case]]:
    """The cases one after the other, until the longest of them so far would no longer fit; then says what is left."""
    start = before = clock()
    longest = 0.0
    for number, (family, case) in enumerate(todo):
        now = clock()
        longest, before = max(longest, now - before), now
        if now - start + longest > budget:
            left = list(dict.fromkeys(case.kernel for _, case in todo[number:]))
            print(f"left out after {now - start:.0f} s of {budget:.0f}: {len(todo) - number} cases. Go on with: "
                  f"python benchmarks/kernels.py --save --only {shlex.join(left)}")
            return
        yield family, case


class Results:
    """Rows of this call, over those that an earlier call saved on the same GPU with the same versions."""

    def __init__(self, folder: Path) -> None:
        import triton

        self.folder = folder
        self.facts = {**machine(), "triton": triton.__version__}
        self.rows: dict[tuple[str, str, str], Row] = {}
        path = folder / "kernels.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if all(old.get("machine", {}).get(name) == self.facts[name] for name in ("gpu", "torch", "triton")):
            for saved in old.get("rows", []):
                row = Row(**{**saved, "sides": [Side(**side) for side in saved["sides"]]})
                self.rows[row.key] = row
        elif old:
            print(f"{path} is of another GPU or version: it is written anew")

    def add(self, row: Row) -> None:
        """Written at once: a call that is cut off keeps what it has."""
        self.rows[row.key] = row
        keep("kernels", {"machine": self.facts, "rows": [asdict(row) for row in self.sorted()]}, self.folder)
        write_csv(self.sorted(), self.folder / "kernels.csv")

    def sorted(self) -> list[Row]:
        return sorted(self.rows.values(), key=lambda row: row.family)

    def plot(self) -> None:
        """One file with a page a family; a line where matplotlib is missing."""
        try:
            import matplotlib  # noqa: F401
            from matplotlib.backends.backend_pdf import PdfPages
        except ImportError:
            print("no plots: matplotlib is not installed (pip install 'triax[plot]')")
            return
        with PdfPages(self.folder / "kernels.pdf") as pages:
            for family in dict.fromkeys(row.family for row in self.sorted()):
                rows = [row for row in self.sorted() if row.family == family]
                pages.savefig(plot(family, rows, str(self.facts["gpu"])))


def profile(case: Case, device: torch.device) -> str:
    """The GPU kernels that one call of ours consists of."""
    from torch.profiler import ProfilerActivity

    run = case.build(device)
    assert run is not None
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    rows = [[f"    {event.key[:80]}", f"{event.count} x", f"{event.self_device_time_total:,.1f} us"]
            for event in events if event.self_device_time_total > 0]
    return table(rows) if rows else "    the profiler saw no kernel"


def obstacle() -> str:
    """Why nothing can be timed here; empty where it can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'triax[gpu]')"
    if not torch.cuda.is_available():
        return "torch sees none" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    return "TRITON_INTERPRET=1 is set" if os.environ.get("TRITON_INTERPRET") == "1" else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="files of benchmarks/cases/, or names of kernels")
    parser.add_argument("--peers", default="all", metavar="WORD,...",
                        help="who is measured beside ours: words in their names, as in eager,sdpa (all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no case is begun")
    parser.add_argument("--save", nargs="?", type=Path, const=RESULTS, metavar="FOLDER",
                        help="write kernels.json, kernels.csv and kernels.pdf; cases not run now keep their rows")
    parser.add_argument("--profile", action="store_true", help="also name the GPU kernels of each case")
    return parser.parse_args()


def main() -> int:
    """Runs the cases; 0, or 1 where one of our own kernels failed, or 2 where nothing can be timed."""
    options = parse()
    todo = with_peers(picked(options.only), options.peers)
    missing = obstacle()
    if missing:
        print(f"benchmarks/kernels.py needs a CUDA GPU, and {missing}; python benchmarks/resources.py compiles every "
              "kernel for sm_90 and sm_80 without one", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    meter, floor, rows = CudaMeter(), floors(device), []
    results = Results(options.save) if options.save else None
    commit = machine()["commit"]
    for family, case in within(options.budget, todo):
        row = measure(family, case, meter, options.rounds, floor, device, commit)
        rows.append(row)
        print(table(lines([row])), flush=True)
        if results:
            results.add(row)
        if options.profile and not row.ours.why:
            print(profile(case, device), flush=True)
        _forget()
    print()
    print(torch.cuda.get_device_name())
    print(table(lines(rows)))
    if results:
        results.plot()
        print(results.folder / "kernels.json")
    failed = [row for row in rows if row.ours.why]
    print(f"{len(rows)} cases, {sum(row.verdict == 'missed' for row in rows)} below target, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
