"""One unit of the input to one shard: read, parsed, encoded and written by the same process."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engine.data.inputs import Document, Fault, Source, Span, Unit, read_span
from engine.data.inputs.meter import Meter, newlines_before
from engine.data.inputs.read import open_meter
from engine.data.pipeline.job import Job
from engine.data.pipeline.settings import NAMED_FAULTS
from engine.data.pipeline.work import PARTS, Shards
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer

Report = Callable[[int, int], None]
"""Told now and then: input bytes read and documents written since it was told last."""

_BATCH = 1 << 18  # characters encoded at a time
_EVERY_S = 0.5


@dataclass
class Shard:
    """What a unit gave; written as the shard's JSON."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    faults: list[tuple[int, int, str]] = field(default_factory=list)
    """(span, line in it, reason) of the first few."""
    spans: list[dict[str, Any]] = field(default_factory=list)
    """For each span its `blocks`, sha256 each, and its `newlines`."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the shard's files."""


class ShardMaker:
    """Makes shards of one job, in one process."""

    def __init__(self, job: Job, shards: Shards, tokenizer: Tokenizer | None = None) -> None:
        self.job, self.shards = job, shards
        self.tokenizer = tokenizer or load_tokenizer(job.tokenizer)
        self.units = job.units()

    def make(self, number: int, report: Report) -> None:
        """Writes the shard of one unit. Raises UserError at the first bad record where the job asks to stop, for a
        source that changed, and when the disk is full."""
        shard = Shard()
        try:
            with contextlib.ExitStack() as stack:
                files = {part: stack.enter_context(open(self.shards.draft(number, part), "wb")) for part in PARTS}
                for ids, lengths in self._batches(self.units[number], shard, report):
                    files["bin"].write(ids.data)
                    files["len"].write(lengths.astype("<i4").data)
                shard.sizes = {part: file.tell() for part, file in files.items()}
                self.shards.publish(number, asdict(shard), files)
        except ConnectionError:
            raise  # the pipe on which we report: the run has ended
        except OSError as error:
            raise UserError(f"cannot write to {self.shards.folder}: {error.strerror or error}") from None
        except BaseException:
            for part in PARTS:
                self.shards.draft(number, part).unlink(missing_ok=True)
            raise

    def _batches(self, unit: Unit, shard: Shard, report: Report) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens of the unit's documents one after another and each one's length, in batches."""
        pace = _Pace(report, shard)
        for index, span in enumerate(unit):
            held: list[str] = []
            size = 0
            for text in self._texts(index, span, shard, pace):
                held.append(text)
                size += len(text)
                if size >= _BATCH:
                    yield self._encode(held, shard)
                    held, size = [], 0
            if held:
                yield self._encode(held, shard)
        pace.tell()

    def _texts(self, index: int, span: Span, shard: Shard, pace: _Pace) -> Iterator[str]:
        source = self.job.sources[span.source]
        with self._meter(source, span) as meter:
            for item in read_span(source, meter, self.job.read_options):
                if isinstance(item, Document):
                    yield item.text
                else:
                    self._fault(index, span, item, shard)
                pace.at(meter.position - span.start)
            shard.spans.append({"blocks": meter.blocks, "newlines": meter.newlines})
        source.check_unchanged()
        pace.end(span.stop - span.start)

    def _meter(self, source: Source, span: Span) -> Meter:
        try:
            return open_meter(source, span.start, span.stop, self.job.read_options, self.job.block_bytes)
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror}") from None

    def _fault(self, index: int, span: Span, fault: Fault, shard: Shard) -> None:
        if self.job.on_error == "stop":
            source = self.job.sources[span.source]
            source.check_unchanged()
            before = 0 if source.kind == "parquet" else newlines_before(source.path, span.start)
            raise UserError(
                f"{source.path}:{before + fault.line}: {fault.message}; nothing is written "
                "(--on-error skip leaves such records out and counts them)"
            )
        shard.skipped += 1
        if len(shard.faults) < NAMED_FAULTS:
            shard.faults.append((index, fault.line, fault.message))

    def _encode(self, texts: list[str], shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        kept = [text for text in texts if text and not text.isspace()]
        ids, lengths = encode(self.tokenizer, kept, self.job.eod_id, self.job.dtype)
        shard.documents += len(lengths)
        shard.empty += len(texts) - len(lengths)
        shard.tokens += len(ids)
        shard.text_bytes += sum(len(text.encode("utf-8")) for text in kept)
        return ids, lengths

    def sample(self, units: int = 4, documents: int = 8) -> list[str]:
        """The first documents of a few units, spread over the input: the same ones in every run."""
        texts: list[str] = []
        chosen = sorted({n * len(self.units) // units for n in range(units)})
        for number in chosen if self.units else ():
            span = self.units[number][0]
            source = self.job.sources[span.source]
            with self._meter(source, span) as meter:
                items = read_span(source, meter, self.job.read_options)
                found = (item.text for item in items if isinstance(item, Document) and item.text.strip())
                texts += itertools.islice(found, documents)
        return texts


def encode(tokenizer: Tokenizer, texts: list[str], eod: int | None, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of documents one after another, each ended by eod unless None, and their lengths; those that give no
    token are left out."""
    end = [] if eod is None else [eod]
    ids = [np.array(tokens + end, dtype) for text in texts if (tokens := tokenizer.encode(text))]
    flat = np.concatenate(ids) if ids else np.empty(0, dtype)
    return flat, np.array([len(document) for document in ids], np.int64)


class _Pace:
    """Passes on how far a unit is, not more often than is of use."""

    def __init__(self, report: Report, shard: Shard) -> None:
        self._report, self._shard = report, shard
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
        done = self._ended + max(self._at, 0)
        self._report(max(done - self._told_bytes, 0), self._shard.documents - self._told_documents)
        self._told_bytes, self._told_documents = max(done, self._told_bytes), self._shard.documents
