"""Finished shards to P.bin, P.idx and P.json: token ids are copied, never decoded; the output appears whole."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.dedup import Deduplicator, Dropped, parse_method
from engine.data.indexed import IndexedWriter
from engine.data.inputs import Span
from engine.data.pipeline.job import Job
from engine.data.pipeline.settings import COUNTED, NAMED_FAULTS, Counts, Settings
from engine.data.pipeline.shard import place
from engine.data.pipeline.steps import parse_rules, unpack
from engine.data.pipeline.work import Shards
from engine.data.quality_report import Report
from engine.data.shuffle import Batch, gather, shuffled
from engine.errors import UserError
from engine.tokenizer import Tokenizer

_COPY_TOKENS = 4 << 20
_COPY_DOCUMENTS = 1 << 16


class Merge:
    """All shards of a job, read in the order of the input."""

    def __init__(self, job: Job, shards: Shards, memory: int) -> None:
        self.job, self.shards, self.memory = job, shards, memory
        self.units, self.dtype = job.units(), np.dtype(job.dtype)
        self.dropped: Dropped | None = None
        self._checked: set[tuple[int, str]] = set()
        self.report = Report()
        """Of the quality rules, where there are any."""

    def counts(self) -> Counts:
        """The sums over all shards, the first bad records with their lines in the file, and the report of the rules.
        Looks for duplicates, which are not among the documents counted."""
        counts = Counts(input_bytes=self.job.input_bytes)
        rules = parse_rules(self.job.quality)
        self.report = Report(rules.thresholds if rules else {})
        lines = [0] * len(self.job.sources)  # line ends in the spans so far
        read, bad = lines[:], lines[:]  # records of each file
        for number, unit in enumerate(self.units):
            about = self.shards.about(number)
            for name in COUNTED:
                setattr(counts, name, getattr(counts, name) + about[name])
            for reason, pages in about["left_out"].items():
                counts.left_out[reason] = counts.left_out.get(reason, 0) + pages
            self._place(unit, about, lines, counts)
            for span, one in zip(unit, about["spans"], strict=True):
                read[span.source] += one["read"]
                bad[span.source] += one["bad"]
        counts.lost = [source.path for source, good, wrong in zip(self.job.sources, read, bad, strict=True)
                       if wrong and not good]
        counts.dropped = {name: self.report.reasons[name].documents if name in self.report.reasons else 0
                          for name in self.report.thresholds}
        self._find_duplicates(counts)
        return counts

    def _place(self, unit: tuple[Span, ...], about: dict[str, Any], lines: list[int], counts: Counts) -> None:
        """Names a shard's faults and samples by their lines in the file."""
        before = [0] * len(unit)
        for index, (span, read) in enumerate(zip(unit, about["spans"], strict=True)):
            if self.job.sources[span.source].has_lines:
                before[index] = lines[span.source]
                lines[span.source] += read["newlines"]

        def named(index: int, line: int) -> str:
            return place(self.job.sources[unit[index].source], line and before[index] + line)

        faults = [f"{named(index, line)}: {message}" for index, line, message in about["faults"]]
        counts.faults += faults[: NAMED_FAULTS - len(counts.faults)]
        if about["report"] is not None:
            part = unpack(about["report"])
            for reason in part.reasons.values():
                reason.samples = {
                    key: (named(*map(int, where.split(":"))), text) for key, (where, text) in reason.samples.items()
                }
            self.report.merge(part)

    def _find_duplicates(self, counts: Counts) -> None:
        method = parse_method(self.job.dedup)
        if method is None:
            return
        width = method.bands * method.words
        with Deduplicator(self.shards.folder / "dedup", method, self.memory) as deduplicator:
            for number in range(len(self.units)):
                signatures = self._part(number, "sig", "<u8").reshape(-1, width)
                for at in range(0, len(signatures), _COPY_DOCUMENTS):
                    deduplicator.add(deduplicator.documents, signatures[at : at + _COPY_DOCUMENTS])
            self.dropped = deduplicator.finish()
        counts.duplicates = self.dropped.dropped
        counts.documents -= self.dropped.dropped
        first = 0
        for number in range(len(self.units)):
            sizes, lengths = self._part(number, "bytes", "<i4"), self._part(number, "len", "<i4")
            for at in range(0, len(sizes), _COPY_DOCUMENTS):
                gone = ~self._kept(first, len(sizes[at : at + _COPY_DOCUMENTS]))
                counts.text_bytes -= int(sizes[at : at + _COPY_DOCUMENTS][gone].sum(dtype=np.int64))
                counts.tokens -= int(lengths[at : at + _COPY_DOCUMENTS][gone].sum(dtype=np.int64))
                first += len(gone)

    def _kept(self, first: int, count: int) -> np.ndarray:
        """Whether each of documents first .. first + count - 1 stays, bool [count]."""
        if self.dropped is None:
            return np.ones(count, bool)
        return ~self.dropped.is_dropped(np.arange(first, first + count))

    def lengths(self) -> Iterator[np.ndarray]:
        """The length of every document that stays, int64, in parts."""
        first = 0
        for number in range(len(self.units)):
            lengths = self._part(number, "len", "<i4")
            for at in range(0, len(lengths), _COPY_DOCUMENTS):
                part = lengths[at : at + _COPY_DOCUMENTS].astype(np.int64)
                yield part[self._kept(first, len(part))]
                first += len(part)

    def batches(self) -> Iterator[Batch]:
        """Every document that stays in the input's order, a bounded number of tokens at a time."""
        first = 0
        for number in range(len(self.units)):
            for tokens, lengths in in_batches(self._part(number, "bin", self.job.dtype),
                                              self._part(number, "len", "<i4")):
                kept = self._kept(first, len(lengths))
                first += len(lengths)
                yield (tokens, lengths) if kept.all() else gather(tokens, lengths, np.flatnonzero(kept))

    def write(self, writer: IndexedWriter, documents: int, seed: int | None) -> None:
        """Gives the writer all documents, shuffled by the seed; None keeps the input's order."""
        found = self.batches()
        if seed is not None:
            found = shuffled(self.lengths, self.batches, documents, seed, writer.folder / "spool", self.dtype,
                             self.memory)
        for ids, lengths in found:
            writer.add_documents(ids, lengths)

    def describe(self, settings: Settings, tokenizer: Tokenizer, counts: Counts) -> dict[str, Any]:
        """P.json: everything that decides the bytes, and nothing else (no times, no paths, no number of workers)."""
        return {
            "format": "triax-corpus",
            "version": 1,
            "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
            "dtype": self.dtype.name,
            "eod_id": self.job.eod_id,
            "counts": counts.content(self.job.dedup != "none"),
            "settings": {name: getattr(settings, name) for name in settings.DECISIVE},
            "inputs": [
                {"name": Path(source.path).name, "size": source.size, **digest}
                for source, digest in zip(self.job.sources, self._digests(), strict=True)
            ],
        }

    def _digests(self) -> list[dict[str, str]]:
        """For each file its sha256, or where it has several blocks the sha256 of theirs: spans of a file are read by
        different processes."""
        counts, alone = [0] * len(self.job.sources), [""] * len(self.job.sources)
        whole = [hashlib.sha256() for _ in self.job.sources]
        for number, unit in enumerate(self.units):
            for span, read in zip(unit, self.shards.about(number)["spans"], strict=True):
                for block in read["blocks"]:
                    counts[span.source] += 1
                    alone[span.source] = block
                    whole[span.source].update(bytes.fromhex(block))
        key = f"sha256_of_blocks_of_{self.job.block_bytes}"
        return [{"sha256": one} if count == 1 else {key: every.hexdigest()}
                for count, one, every in zip(counts, alone, whole, strict=True)]

    def _part(self, number: int, part: str, dtype: str) -> np.ndarray:
        """A file of a shard; its bytes are compared with their checksum the first time it is looked at. Raises
        UserError."""
        path = self.shards.path(number, part)
        if path.stat().st_size == 0:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        found = np.memmap(path, dtype=np.dtype(dtype), mode="r").view(np.ndarray)
        if (number, part) not in self._checked:
            if zlib.crc32(found.data) != self.shards.about(number)["crc32"].get(part, 0):
                self.shards.undo(number)
                raise UserError(f"{path} does not match its checksum: the disk has damaged it; the same command makes "
                                "that part again")
            self._checked.add((number, part))
        return found


def in_batches(tokens: np.ndarray, lengths: np.ndarray) -> Iterator[Batch]:
    """Documents one after another in batches of a bounded number of tokens, at least one document each.

    Raises UserError when lengths and tokens do not fit."""
    at = start = 0
    while at < len(lengths):
        part = lengths[at : at + _COPY_DOCUMENTS].astype(np.int64)
        ends = np.cumsum(part)
        take = max(1, int(np.searchsorted(ends, _COPY_TOKENS, side="right")))
        stop = start + int(ends[take - 1])
        if stop > len(tokens):
            raise UserError(f"a shard's documents have {stop} tokens or more, its file {len(tokens)}")
        yield tokens[start:stop], part[:take]
        at, start = at + take, stop
