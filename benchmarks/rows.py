"""What `benchmarks/kernels.py` measured: the arithmetic of its figures, its table, its CSV and its plots."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "ours"


@dataclass
class Side:
    """One contender of a case: seconds a call, by round, and memory beyond its inputs; or why it has none."""

    name: str
    seconds: list[float] = field(default_factory=list)
    extra: int = 0
    why: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Row:
    """A case as it was measured; `sides` begins with ours. The floor's rates are this GPU's in the same rounds: bytes
    and operations a second, 0 where the case has none."""

    family: str
    kernel: str
    shape: str
    dtype: str
    bytes: int
    flops: int
    target: float
    commit: str
    sides: list[Side]
    copy_rate: float = 0.0
    product_rate: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.shape, self.dtype

    @property
    def ours(self) -> Side:
        return self.sides[0]

    @property
    def floor(self) -> float:
        """Seconds that its bytes or its operations take at least, at the rates of the copy and of the product."""
        return max(part / rate if rate else 0.0
                   for part, rate in ((self.bytes, self.copy_rate), (self.flops, self.product_rate)))

    def share(self, side: Side) -> float:
        """Of the floor's rate, 1 at best. More is possible where the L2 cache holds what was counted as traffic."""
        return self.floor / side.median

    def ratio(self, side: Side) -> float:
        """Median over rounds of its time over ours: above 1, ours is faster."""
        return statistics.median(theirs / mine for theirs, mine in zip(side.seconds, self.ours.seconds, strict=True))

    def rate(self, side: Side) -> tuple[float, str]:
        """What it achieved of that which bounds it."""
        moving = self.bytes and self.bytes / self.copy_rate >= self.floor
        return (self.bytes if moving else self.flops) / side.median / 1e12, "TB/s" if moving else "TFLOP/s"

    @property
    def verdict(self) -> str:
        if self.ours.why:
            return "failed"
        return "" if not self.target else "met" if self.share(self.ours) >= self.target else "missed"


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table: a line a case with our figures, and one for each peer under it."""
    found = [["case", "dtype", "us", "rate", "of floor", "target", "time / ours", "extra MB"]]
    for row in rows:
        for side in row.sides:
            mine = side is row.ours
            name = f"{row.kernel}, {row.shape}" if mine else f"    {side.name}"
            if side.why:
                found.append([f"{name}: {side.why}", row.dtype if mine else "", "-", "-", "-",
                              row.verdict if mine else "", "-", "-"])
                continue
            rate, unit = row.rate(side)
            goal = f"{row.target:.0%} {row.verdict}" if row.target else ""
            found.append([name, row.dtype if mine else "", f"{side.median * 1e6:,.1f}", f"{rate:,.2f} {unit}",
                          f"{row.share(side):.0%}", goal if mine else "", "" if mine else f"{row.ratio(side):.2f}",
                          f"{side.extra / 1e6:,.1f}"])
    return found


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each side of each case."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["family", "kernel", "shape", "dtype", "side", "microseconds", "rate", "unit",
                         "share_of_floor", "time_over_ours", "extra_bytes", "target", "verdict", "why", "commit"])
        for row in rows:
            for side in row.sides:
                figures: list[Any] = [""] * 6
                if not side.why:
                    rate, unit = row.rate(side)
                    figures = [f"{side.median * 1e6:.2f}", f"{rate:.4f}", unit, f"{row.share(side):.4f}",
                               f"{row.ratio(side):.4f}", side.extra]
                mine = side is row.ours
                writer.writerow([row.family, *row.key, side.name, *figures, row.target if mine else "",
                                 row.verdict if mine else "", side.why, row.commit])


def plot(family: str, rows: Sequence[Row], gpu: str) -> Any:
    """A figure with a bar for each side of each case, its share of the floor; the floor is the line at 100 %, dashes
    are targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = [row for row in rows if not row.ours.why]
    names = list(dict.fromkeys(side.name for row in rows for side in row.sides))
    figure = Figure(figsize=(3.5 + 2.2 * max(2, len(rows)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        bars = [(at, 100 * row.share(side)) for at, row in enumerate(rows)
                for side in row.sides if side.name == name and not side.why]
        places = axes.bar([at - 0.4 + (number + 0.5) * width for at, _ in bars], [share for _, share in bars], width,
                          label=name, color=f"C{number % 10}")
        axes.bar_label(places, fmt="%.0f", fontsize=7)
    axes.axhline(100, color="black", linewidth=1, label="floor: measured copy, matrix product")
    goals = [(at, 100 * row.target) for at, row in enumerate(rows) if row.target]
    axes.hlines([goal for _, goal in goals], [at - 0.45 for at, _ in goals], [at + 0.45 for at, _ in goals],
                colors="gray", linestyles="dashed", linewidth=1, label="target")
    axes.set_xticks(range(len(rows)), [f"{row.kernel}\n{row.shape}\n{row.dtype}" for row in rows], fontsize=7)
    axes.set_ylabel("% of the floor's rate (higher is faster)")
    axes.set_title(f"{family} on {gpu}", fontsize=10)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure
