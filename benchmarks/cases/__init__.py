"""The cases of all kernels, a file each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from cases.base import Case


def all_cases(only: Sequence[str] = (), tiny: bool = False) -> list[Case]:
    """The `CASES` of every file in this folder, or of those named; where `tiny` is asked for, its `TINY`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise SystemExit(f"no cases named {', '.join(unknown)}; there are {', '.join(names)}")
    return [case for name in names if not only or name in only
            for case in getattr(importlib.import_module(f"cases.{name}"), "TINY" if tiny else "CASES")]
