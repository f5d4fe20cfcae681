"""Finished shards to P.bin, P.idx and P.json: token ids are copied, never decoded; the output appears whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.indexed import IndexedWriter
from engine.data.inputs import Span
from engine.data.pipeline.job import Job
from engine.data.pipeline.settings import NAMED_FAULTS, Counts, Settings
from engine.data.pipeline.work import Shards
from engine.data.shuffle import Batch, shuffled
from engine.errors import UserError
from engine.tokenizer import Tokenizer

_COPY_TOKENS = 4 << 20
_COPY_DOCUMENTS = 1 << 16


class Merge:
    """All shards of a job, read in the order of the input."""

    def __init__(self, job: Job, shards: Shards) -> None:
        self.job, self.shards, self.units = job, shards, job.units()
        self.dtype = np.dtype(job.dtype)

    def counts(self) -> Counts:
        """The sums over all shards, and the first bad records with their lines in the file."""
        counts = Counts(input_bytes=self.job.input_bytes)
        lines: dict[int, int] = {}  # line ends in the spans so far of each file
        for number, unit in enumerate(self.units):
            about = self.shards.about(number)
            for name in ("documents", "tokens", "text_bytes", "empty", "skipped"):
                setattr(counts, name, getattr(counts, name) + about[name])
            counts.faults += self._faults(unit, about, lines)[: NAMED_FAULTS - len(counts.faults)]
        return counts

    def _faults(self, unit: tuple[Span, ...], about: dict[str, Any], lines: dict[int, int]) -> list[str]:
        named = []
        for index, (span, read) in enumerate(zip(unit, about["spans"], strict=True)):
            source = self.job.sources[span.source]
            before = lines.get(span.source, 0) if source.kind != "parquet" else 0
            mine = [(line, message) for at, line, message in about["faults"] if at == index]
            named += [f"{source.path}:{before + line}: {message}" for line, message in mine]
            lines[span.source] = before + read["newlines"]
        return named

    def lengths(self) -> Iterator[np.ndarray]:
        """The length of every document, int64, in parts."""
        for number in range(len(self.units)):
            lengths = _map(self.shards.path(number, "len"), np.dtype("<i4"))
            for at in range(0, len(lengths), _COPY_DOCUMENTS):
                yield lengths[at : at + _COPY_DOCUMENTS].astype(np.int64)

    def batches(self) -> Iterator[Batch]:
        """Every document in the input's order, a bounded number of tokens at a time."""
        for number in range(len(self.units)):
            tokens = _map(self.shards.path(number, "bin"), self.dtype)
            lengths = _map(self.shards.path(number, "len"), np.dtype("<i4"))
            yield from in_batches(tokens, lengths)

    def write(self, writer: IndexedWriter, documents: int, settings: Settings) -> None:
        """Gives the writer all documents in the order asked for."""
        found = self.batches()
        if settings.shuffle_seed is not None:
            found = shuffled(self.lengths, self.batches, documents, settings.shuffle_seed, writer.folder / "spool",
                             self.dtype, settings.memory_bytes)
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
            "counts": {
                name: getattr(counts, name) for name in ("documents", "tokens", "text_bytes", "empty", "skipped")
            },
            "settings": {
                "json_key": settings.json_key,
                "split_text": settings.split_text,
                "encoding": settings.encoding,
                "shuffle_seed": settings.shuffle_seed,
                "append_eod": settings.append_eod,
                "on_error": settings.on_error,
            },
            "inputs": [
                {"name": Path(source.path).name, "size": source.size, **digest}
                for source, digest in zip(self.job.sources, self._digests(), strict=True)
            ],
        }

    def _digests(self) -> list[dict[str, str]]:
        """For each file its sha256, or where it has several blocks the sha256 of theirs: spans of a file are read by
        different processes."""
        blocks: list[list[str]] = [[] for _ in self.job.sources]
        for number, unit in enumerate(self.units):
            for span, read in zip(unit, self.shards.about(number)["spans"], strict=True):
                blocks[span.source] += read["blocks"]
        return [_digest(found, self.job.block_bytes) for found in blocks]


def _digest(blocks: list[str], block_bytes: int) -> dict[str, str]:
    if len(blocks) == 1:
        return {"sha256": blocks[0]}
    whole = hashlib.sha256(b"".join(bytes.fromhex(block) for block in blocks))
    return {f"sha256_of_blocks_of_{block_bytes}": whole.hexdigest()}


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


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
