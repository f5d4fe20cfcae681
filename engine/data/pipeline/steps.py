"""What is done to a document before it is encoded, as a job's settings name it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.data.clean import Cleaner
from engine.data.quality import Rules
from engine.data.quality_report import Reason, Report
from engine.errors import UserError, nearest

CLEANING = ("nfc", "control", "whitespace")


def parse_cleaning(spec: str) -> Cleaner:
    """"nfc,control,whitespace", any of them, "all" or "none". Raises UserError."""
    names = [name for name in spec.split(",") if name not in ("", "none")]
    for name in names:
        if name not in (*CLEANING, "all"):
            hint = nearest(name, (*CLEANING, "all", "none"))
            raise UserError(
                f'"{name}" is no way to clean; known are {", ".join(CLEANING)}, all and none'
                + (f"; did you mean {hint}?" if hint else "")
            )
    return Cleaner(**{name: name in names or "all" in names for name in CLEANING})


def parse_rules(spec: str) -> Rules | None:
    """The quality rules of a spec; None for "none". Raises UserError."""
    return None if spec == "none" else Rules(spec)


def pack(report: Report) -> dict[str, Any]:
    """A report of a shard as JSON keeps it."""
    reasons = {name: asdict(reason) for name, reason in report.reasons.items()}
    return {"documents": report.documents, "characters": report.characters, "reasons": reasons}


def unpack(packed: dict[str, Any]) -> Report:
    """The report that `pack` was given, but for its thresholds."""
    report = Report(documents=packed["documents"], characters=packed["characters"])
    for name, entry in packed["reasons"].items():
        samples = {int(key): (where, text) for key, (where, text) in entry["samples"].items()}
        report.reasons[name] = Reason(entry["documents"], entry["characters"], samples)
    return report
