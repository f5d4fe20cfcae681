"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_text(count: float) -> str:
    """Bytes in decimal units, as memory is sold: 121.3 GB."""
    return _scaled(count, ("B", "KB", "MB", "GB", "TB", "PB"))


def count_text(count: float) -> str:
    """A count of parameters: 6.74 B."""
    return _scaled(count, ("", "K", "M", "B", "T")).rstrip()


def flops_text(count: float) -> str:
    """Floating-point operations: 42.9 GFLOP."""
    return _scaled(count, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(count: float, units: Sequence[str]) -> str:
    """Three or four digits and a unit; below 1000 the plain number."""
    value, power = float(count), 0
    while value >= 999.5 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 else 2 if value < 9.995 else 1
    return f"{value:.{digits}f} {units[power]}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, columns aligned to the right, two blanks between them."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
