"""One unit of the input to one shard: read, cleaned, judged, encoded and written by the same process."""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engine.data.dedup import parse_method
from engine.data.inputs import Document, Fault, LeftOut, Source, Span, Unit, read_span
from engine.data.inputs.meter import Meter, newlines_before
from engine.data.inputs.read import open_meter
from engine.data.pipeline.job import Job
from engine.data.pipeline.settings import NAMED_FAULTS
from engine.data.pipeline.steps import pack, parse_cleaning, parse_rules
from engine.data.pipeline.work import Shards
from engine.data.quality_report import Report
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer

Told = Callable[[int, int], None]
"""Told now and then: input bytes read and documents written since it was told last."""

_BATCH = 1 << 20  # characters encoded at a time
_SAMPLE = 1 << 16  # characters of a document at most that the encoder is checked on
_EVERY_S = 0.5


@dataclass
class Shard:
    """What a unit gave; written as the shard's JSON."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Pages of dumps that are no articles, by reason."""
    faults: list[tuple[int, int, str]] = field(default_factory=list)
    """(span, line in it, reason) of the first few."""
    spans: list[dict[str, Any]] = field(default_factory=list)
    """For each span its `blocks`, sha256 each, its `newlines`, and the records `read` and `bad`."""
    report: dict[str, Any] | None = None
    """Of the quality rules; a sample's place is "span:line"."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the shard's files."""
    crc32: dict[str, int] = field(default_factory=dict)
    """Of each file's bytes, taken while they were written: the merge compares them, maybe days later."""


class ShardMaker:
    """Makes shards of one job, in one process."""

    def __init__(self, job: Job, shards: Shards, tokenizer: Tokenizer | None = None) -> None:
        self.job, self.shards = job, shards
        self.tokenizer = tokenizer or load_tokenizer(job.tokenizer)
        self.units = job.units()
        self.cleaner, self.rules, self.method = (
            parse_cleaning(job.clean), parse_rules(job.quality), parse_method(job.dedup)
        )  # fmt: skip

    def make(self, number: int, told: Told) -> None:
        """Writes the shard of one unit and puts it in place. Raises UserError, as `write` does."""
        try:
            self.write(number, told)
            self.shards.publish(number, self.job.parts)
        finally:
            self.shards.discard_drafts(number, self.job.parts)

    def write(self, number: int, told: Told) -> None:
        """Writes the draft of a unit's shard. Raises UserError at the first bad record where the job asks to stop, for
        a source that changed, and when the disk is full."""
        shard = Shard()
        drafts = {part: self.shards.draft(number, part) for part in self.job.parts}
        try:
            with contextlib.ExitStack() as stack:
                files = {part: stack.enter_context(open(path, "wb")) for part, path in drafts.items()}
                for arrays in self._batches(self.units[number], shard, told):
                    for part, array in arrays.items():
                        content = np.ascontiguousarray(array).data
                        files[part].write(content)
                        shard.crc32[part] = zlib.crc32(content, shard.crc32.get(part, 0))
                shard.sizes = {part: file.tell() for part, file in files.items()}
            self.shards.write_about(number, asdict(shard))
        except ConnectionError:
            raise  # the pipe on which we report: the run has ended
        except OSError as error:
            raise UserError(f"cannot write to {self.shards.folder}: {error.strerror or error}") from None

    def _batches(self, unit: Unit, shard: Shard, told: Told) -> Iterator[dict[str, np.ndarray]]:
        """What goes to each of the shard's files, a batch of documents at a time."""
        pace, report = _Pace(told, shard), Report()
        for index, span in enumerate(unit):
            held: list[str] = []
            size = 0
            for text in self._texts(index, span, shard, report, pace):
                held.append(text)
                size += len(text)
                if size >= _BATCH:
                    yield self._encode(held, shard)
                    held, size = [], 0
            if held:
                yield self._encode(held, shard)
        shard.report = pack(report) if self.rules else None
        pace.tell()

    def _texts(self, index: int, span: Span, shard: Shard, report: Report, pace: _Pace) -> Iterator[str]:
        """The texts of a span that are to be encoded; everything else is counted."""
        source = self.job.sources[span.source]
        found = bad = 0
        with self._meter(source, span) as meter:
            for item in read_span(source, meter, self.job.read_options):
                if isinstance(item, Fault):
                    bad += 1
                else:
                    found += 1
                if isinstance(item, Document):
                    text = self.cleaner.clean(item.text)
                    if not text or text.isspace():
                        shard.empty += 1
                    elif self._is_kept(text, f"{index}:{item.line}", report):
                        yield text
                elif isinstance(item, LeftOut):
                    shard.left_out[item.reason] = shard.left_out.get(item.reason, 0) + 1
                else:
                    self._fault(index, span, item, shard)
                pace.at(min(meter.position, span.stop) - span.start)
            shard.spans.append({"blocks": meter.blocks, "newlines": meter.newlines, "read": found, "bad": bad})
        source.check_unchanged()
        pace.end(span.stop - span.start)

    def _is_kept(self, text: str, where: str, report: Report) -> bool:
        if self.rules is None:
            return True
        reason = self.rules.judge(text)
        report.add(text, reason, where)
        return reason is None

    def _meter(self, source: Source, span: Span) -> Meter:
        try:
            return open_meter(source, span.start, span.stop, self.job.read_options, self.job.block_bytes)
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror}") from None

    def _fault(self, index: int, span: Span, fault: Fault, shard: Shard) -> None:
        if self.job.on_error == "stop":
            source = self.job.sources[span.source]
            source.check_unchanged()
            before = newlines_before(source.path, span.start) if source.has_lines else 0
            raise UserError(
                f"{place(source, before + fault.line)}: {fault.message}; nothing is written "
                "(--on-error skip leaves such records out and counts them)"
            )
        shard.skipped += 1
        if len(shard.faults) < NAMED_FAULTS:
            shard.faults.append((index, fault.line, fault.message))

    def _encode(self, texts: list[str], shard: Shard) -> dict[str, np.ndarray]:
        """Raises UserError for ids outside the vocabulary only when they are merged: the writer looks at each."""
        ids, lengths = self.tokenizer.encode_documents(texts, self.job.eod_id)
        full = lengths > 0  # a text may give no token
        sizes = np.array([len(text.encode("utf-8")) for text in texts], np.int64)
        shard.documents += int(full.sum())
        shard.empty += int((~full).sum())
        shard.tokens += len(ids)
        shard.text_bytes += int(sizes[full].sum())
        arrays = {"bin": ids.astype(self.job.dtype, copy=False), "len": lengths[full].astype("<i4")}
        if self.method is not None:
            arrays["sig"] = self.method.signatures(texts)[full].astype("<u8", copy=False)
            arrays["bytes"] = sizes[full].astype("<i4")
        return arrays

    def sample(self, units: int = 4, documents: int = 8) -> list[str]:
        """The first documents of a few units, spread over the input, as they would be encoded: the same in every run.
        None of a unit that cannot be read: making its shard will say why."""
        texts: list[str] = []
        for number in sorted({n * len(self.units) // units for n in range(units)}) if self.units else ():
            span = self.units[number][0]
            source = self.job.sources[span.source]
            with self._meter(source, span) as meter:
                items = read_span(source, meter, self.job.read_options)
                found = (self.cleaner.clean(item.text)[:_SAMPLE] for item in items if isinstance(item, Document))
                texts += itertools.islice(found, documents)
        return texts


def place(source: Source, line: int) -> str:
    """Where in the input something is: file and line, or the file where it has no lines."""
    return f"{source.path}:{line}" if line else source.path


class _Pace:
    """Passes on how far a unit is, not more often than is of use."""

    def __init__(self, told: Told, shard: Shard) -> None:
        self._tell, self._shard = told, shard
        self._ended = self._at = self._told_bytes = self._told_documents = 0
        self._when = time.monotonic()

    def at(self, read: int) -> None:
        """Notes the bytes read of the span in hand."""
        self._at = read
        if time.monotonic() - self._when >= _EVERY_S:
            self.tell()

    def end(self, size: int) -> None:
        """Notes that a span of `size` bytes is done."""
        self._ended, self._at = self._ended + size, 0

    def tell(self) -> None:
        """Reports what is new."""
        self._when = time.monotonic()
        done = max(self._ended + self._at, self._told_bytes)
        self._tell(done - self._told_bytes, self._shard.documents - self._told_documents)
        self._told_bytes, self._told_documents = done, self._shard.documents
