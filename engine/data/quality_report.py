"""What was left out and why: counts by reason, and a few samples of each, the same for any number of workers.

The samples of a reason are the texts with the least hashes (of seed and text), so they are drawn evenly among different
texts, and reports of parts merge into the report of the whole whatever the parts are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.quality import RULES
from engine.errors import UserError

SAMPLE_CHARACTERS = 200


@dataclass
class Reason:
    """What one reason for leaving out documents took."""

    documents: int = 0
    characters: int = 0
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Where it was and how it begins, by the hash of the text."""

    def keep(self, count: int) -> None:
        """The samples with the least hashes stay."""
        for key in sorted(self.samples)[count:]:
            del self.samples[key]


@dataclass
class Report:
    """Counts and samples; a chunk's worth is made by a worker and merged in the order of the documents."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of the rules in force (Rules.thresholds): each has its line, were it to take out nothing."""
    samples: int = 5
    """Kept for each reason."""
    seed: int = 0
    documents: int = 0
    characters: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)

    def add(self, text: str, reason: str | None, where: str = "") -> None:
        """Counts a document. reason: None for one that stays, else a rule's name or any other, as "duplicate".
        where: its file and line, to be found again."""
        self.documents += 1
        self.characters += len(text)
        if reason is None:
            return
        entry = self.reasons.setdefault(reason, Reason())
        entry.documents += 1
        entry.characters += len(text)
        entry.samples.setdefault(self._hash(text), (where, text[:SAMPLE_CHARACTERS]))
        entry.keep(self.samples)

    def merge(self, other: Report) -> None:
        """Adds what came after. Equal texts leave the sample that came first."""
        self.documents += other.documents
        self.characters += other.characters
        for reason, theirs in other.reasons.items():
            ours = self.reasons.setdefault(reason, Reason())
            ours.documents += theirs.documents
            ours.characters += theirs.characters
            ours.samples = {**theirs.samples, **ours.samples}
            ours.keep(self.samples)

    def content(self) -> dict[str, Any]:
        """The report as JSON writes it."""
        gone = self.reasons.values()
        return {
            "documents": self.documents,
            "characters": self.characters,
            "kept": {
                "documents": self.documents - sum(entry.documents for entry in gone),
                "characters": self.characters - sum(entry.characters for entry in gone),
            },
            "dropped": {reason: self._entry(reason) for reason in self._in_order()},
        }

    def table(self) -> str:
        """The report to read."""
        content = self.content()
        rows = [("", "limit", "documents", "", "characters", ""), self._row("in", "", content)]
        for reason, entry in content["dropped"].items():
            rows.append(self._row(reason, _limit(entry), entry))
        rows.append(self._row("kept", "", content["kept"]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *numbers in rows:
            cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
        for reason, entry in content["dropped"].items():
            for sample in entry["samples"]:
                lines += ["", f"{reason}: {sample['where']}".rstrip(": "), f"    {_one_line(sample['text'])}"]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> None:
        """Writes JSON at path and the table beside it, ending in .txt. Raises UserError when it cannot."""
        written = json.dumps(self.content(), indent=2, ensure_ascii=False) + "\n"
        for target, content in zip(report_paths(path), (written, self.table()), strict=True):
            partial = target.with_name(target.name + ".partial")
            try:
                # A lone surrogate becomes the escape that JSON has for it.
                partial.write_bytes(content.encode("utf-8", "backslashreplace"))
                os.replace(partial, target)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise UserError(f"cannot write the report {target}: {error.strerror}") from None

    def _hash(self, text: str) -> int:
        raw = text.encode("utf-8", "surrogatepass")
        key = self.seed.to_bytes(8, "little", signed=True)
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "big")

    def _in_order(self) -> list[str]:
        """Rules as they are asked, then other reasons by name."""
        return [*self.thresholds, *sorted(set(self.reasons) - set(self.thresholds))]

    def _entry(self, reason: str) -> dict[str, Any]:
        entry = self.reasons.get(reason, Reason())
        content: dict[str, Any] = {"documents": entry.documents, "characters": entry.characters}
        if reason in self.thresholds:
            rule = RULES[reason]
            content["measure"] = rule.meaning
            content["fails"] = "below" if rule.is_least else "above"
            content["threshold"] = self.thresholds[reason]
        content["samples"] = [{"where": where, "text": text} for _, (where, text) in sorted(entry.samples.items())]
        return content

    def _row(self, name: str, limit: str, counts: Mapping[str, int]) -> tuple[str, ...]:
        documents, characters = counts["documents"], counts["characters"]
        return (
            name, limit,
            f"{documents:,}", f"{documents / max(self.documents, 1):.2%}",
            f"{characters:,}", f"{characters / max(self.characters, 1):.2%}",
        )


def report_paths(path: str | Path) -> tuple[Path, Path]:
    """Where a report's JSON and its table lie. Raises UserError for a name that is the table's own."""
    path = Path(path)
    if path.suffix == ".txt" or not path.name:
        name = f"{path.stem or 'report'}.json"
        raise UserError(f"the report {path} is JSON and a .txt is written beside it; name it {name}")
    return path, path.with_suffix(".txt")


def _limit(entry: Mapping[str, Any]) -> str:
    return f"{'<' if entry['fails'] == 'below' else '>'} {entry['threshold']:g}" if "threshold" in entry else ""


def _one_line(text: str) -> str:
    """Safe to print: a document's control characters are not for our reader's terminal."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))
