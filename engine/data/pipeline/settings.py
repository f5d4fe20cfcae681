"""What a run of the preparation is asked, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

DEFAULT_SEED = 1234
NAMED_FAULTS = 20
"""Bad records that are named; the rest are counted."""
COUNTED = ("documents", "tokens", "text_bytes", "empty", "skipped")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to turn into tokens, and how."""

    inputs: Sequence[str]
    """Files, folders and patterns, in the order their documents get."""
    tokenizer: str
    output_prefix: str
    json_key: str = "text"
    split_text: str = "document"
    """What a document is in plain text: "document" (the file), "line", or "blank" (between blank lines)."""
    encoding: str = "utf-8"
    """Of text without a byte-order mark."""
    shuffle_seed: int | None = DEFAULT_SEED
    """None keeps the input's order."""
    clean: str = "none"
    """What is changed in the text: any of "nfc,control,whitespace", or "all"."""
    quality: str = "none"
    """The rules a document must pass to stay: "default", or what quality.Rules takes."""
    dedup: str = "none"
    """"exact", "near" or "near:20x5" (bands x rows): of duplicates the first stays."""
    report: str | None = None
    """A file for what the rules took out: JSON, and a .txt to read beside it."""
    append_eod: bool = True
    """Ends each document with the tokenizer's end-of-document token."""
    on_error: str = "stop"
    """"stop" at the first bad record, writing nothing, or "skip" and count it."""
    workers: int | None = None
    """Processes; None: one a core. The output does not depend on it."""
    overwrite: bool = False
    memory_bytes: int = 256 << 20
    """What ordering the documents may take. The output does not depend on it."""
    unit_bytes: int | None = None
    """The input is worked on in parts of at least this size; None: chosen by the size of the input."""

    DECISIVE: ClassVar = ("json_key", "split_text", "encoding", "clean", "quality", "dedup", "shuffle_seed",
                          "append_eod", "on_error")
    """What P.json tells: the settings that decide its bytes."""


@dataclass
class Counts:
    """What went in and came out."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    """The first few skipped records: file, line and reason."""
    lost: list[str] = field(default_factory=list)
    """Files of which nothing could be read: as on_error "skip" leaves bad records out, all of theirs were."""
    input_bytes: int = 0
    duplicates: int = 0
    """Left out, an earlier one being kept."""
    dropped: dict[str, int] = field(default_factory=dict)
    """By the quality rule that a document failed."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Pages of dumps that are no articles, by reason."""

    def content(self, deduplicated: bool) -> dict[str, Any]:
        """For P.json; what was not asked for is not there."""
        found: dict[str, Any] = {name: getattr(self, name) for name in COUNTED}
        if deduplicated:
            found["duplicates"] = self.duplicates
        if self.dropped:
            found["dropped"] = self.dropped
        if self.left_out:
            found["pages_left_out"] = dict(sorted(self.left_out.items()))
        return found
