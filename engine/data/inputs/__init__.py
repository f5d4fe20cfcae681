"""Raw input of any kind as documents: files found, cut into spans, and read a span at a time in constant memory."""

from __future__ import annotations

from engine.data.inputs.items import MAX_RECORD_BYTES, BadRecord, Document, Fault, LeftOut, lost_whole
from engine.data.inputs.plan import Span, Unit, plan, unit_bytes_of
from engine.data.inputs.read import ReadOptions, read_span
from engine.data.inputs.source import SPLITS, Source, find_sources

__all__ = [
    "MAX_RECORD_BYTES",
    "SPLITS",
    "BadRecord",
    "Document",
    "Fault",
    "LeftOut",
    "ReadOptions",
    "Source",
    "Span",
    "Unit",
    "find_sources",
    "lost_whole",
    "plan",
    "read_span",
    "unit_bytes_of",
]
