"""A sample of the input to train a vocabulary on: every text has the same chance, wherever it stands.

A text's key is a hash of the seed and the text, a random number for all purposes; the texts with the lowest keys are
the sample. That is reservoir sampling by random keys (Efraimidis and Spirakis, "Weighted random sampling with a
reservoir", 2006, all weights one) with keys as in bottom-k sketches (Cohen and Kaplan, "Summarizing data using bottom-k
sketches", 2007). One pass, memory bounded by the budget, and the outcome depends on seed and texts alone: on no order,
no file name, no compression.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.data.inputs import Document, Fault, LeftOut, ReadOptions, Source, Span, find_sources, plan, read_span
from engine.data.inputs.meter import BLOCK_BYTES, Meter, newlines_before
from engine.data.inputs.read import open_meter
from engine.data.progress import Progress
from engine.errors import UserError

DEFAULT_SEED = 1234
SAMPLE_BYTES = 256 << 20
_NAMED_FAULTS = 20  # bad records that are named; the rest are counted
_EVERY_S = 0.2


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What to read and how much of it to keep. All but the last three mean what they mean to the preparation."""

    inputs: Sequence[str]
    """Files, folders and patterns."""
    json_key: str = "text"
    split_text: str = "document"
    encoding: str = "utf-8"
    on_error: str = "stop"
    sample_bytes: int = SAMPLE_BYTES
    """UTF-8 bytes to keep at most."""
    read_bytes: int | None = None
    """About how many bytes of the input to read, in parts drawn by the seed; None reads all."""
    seed: int = DEFAULT_SEED


@dataclass
class ReadCounts:
    """What was read."""

    documents: int = 0
    text_bytes: int = 0
    input_bytes: int = 0
    """Of the files, as they lie."""
    empty: int = 0
    skipped: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Pages of dumps that are no articles, by reason."""
    faults: list[str] = field(default_factory=list)
    """The first few skipped records: file, line and reason."""
    lost: list[str] = field(default_factory=list)
    """Files of which nothing could be read, bad records being skipped."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The texts kept, in the order of their keys, and where they come from."""

    documents: list[bytes]
    """UTF-8, which for Chinese takes less memory than str."""
    sources: list[Source]
    read: ReadCounts

    @property
    def size(self) -> int:
        """UTF-8 bytes of all."""
        return sum(map(len, self.documents))

    def texts(self) -> Iterator[str]:
        """The texts as str, one at a time."""
        return (document.decode("utf-8") for document in self.documents)


class Reservoir:
    """Keeps the texts with the lowest keys, as many as fill a budget of bytes.

    Of a text's copies the second and later ones get keys of their own, not below the first's: where all fits all are
    kept; where one in a hundred fits, a text that is there a thousand times can't fill the sample by itself."""

    def __init__(self, budget: int, seed: int) -> None:
        self._budget, self._seed = budget, seed.to_bytes(8, "little", signed=True)
        self._heap: list[tuple[int, bytes]] = []  # (-key, text): the highest key is on top
        self._copies: dict[int, int] = {}  # of the texts that are held, by the key of the first
        self._size = 0

    def add(self, text: str) -> None:
        """Takes the text in, or not. Raises UnicodeEncodeError for half a character."""
        data = text.encode("utf-8")
        first = key = self._key(data, 0)
        copies = self._copies.get(first, 0)
        if copies:
            self._copies[first] = copies + 1
            key = max(first + 1, self._key(data, copies))
        if self._size >= self._budget and key > -self._heap[0][0]:
            return  # lower keys fill the budget already, and no later text changes that
        if not copies:
            self._copies[first] = 1
        heapq.heappush(self._heap, (-key, data))
        self._size += len(data)
        while self._size - len(self._heap[0][1]) >= self._budget:
            last, gone = heapq.heappop(self._heap)
            self._size -= len(gone)
            self._copies.pop(-last, None)

    def _key(self, data: bytes, copy: int) -> int:
        salt = copy.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._seed, salt=salt).digest(), "little")

    def documents(self) -> list[bytes]:
        """The sample in the order of keys; the last text is cut, between characters, where the budget ends."""
        kept = [data for _, data in sorted(self._heap, reverse=True)]
        over = self._size - self._budget
        if kept and over > 0:
            kept[-1] = kept[-1][: len(kept[-1]) - over].decode("utf-8", errors="ignore").encode("utf-8")
        return [data for data in kept if data]


def draw_sample(settings: SampleSettings) -> Sample:
    """Reads the input once and keeps a sample of it.

    Raises UserError for inputs that cannot be read, at a bad record where settings.on_error is "stop", and for a file
    that changes meanwhile. Says on stderr how far it is."""
    for name, number in (("sample", settings.sample_bytes), ("read", settings.read_bytes)):
        if number is not None and number < 1:
            raise UserError(f"--{name}-megabytes must be at least 1")
    if not -(1 << 63) <= settings.seed < 1 << 63:
        raise UserError(f"--seed {settings.seed} does not fit in 64 bits")
    return _Reading(settings).run()


class _Reading:
    """One pass over the input."""

    def __init__(self, settings: SampleSettings) -> None:
        self._settings = settings
        self._options = ReadOptions(json_key=settings.json_key, split_text=settings.split_text)
        self._sources = find_sources(settings.inputs, settings.encoding)
        self._counts = ReadCounts()
        self._good: Counter[str] = Counter()  # records of each file
        self._bad: Counter[str] = Counter()
        self._reservoir = Reservoir(settings.sample_bytes, settings.seed)

    def run(self) -> Sample:
        spans = [span for unit in plan(self._sources, self._options.split_text) for span in unit]
        spans = self._drawn(spans)
        with Progress(sum(span.stop - span.start for span in spans)) as progress:
            for span in spans:
                self._read(span, progress)
        self._counts.lost = [path for path in self._bad if not self._good[path]]
        return Sample(documents=self._reservoir.documents(), sources=self._sources, read=self._counts)

    def _drawn(self, spans: list[Span]) -> list[Span]:
        """The parts to read, in their order: those with the lowest keys until they are enough."""
        limit = self._settings.read_bytes
        if limit is None:
            return spans
        chosen: set[Span] = set()
        size = 0
        for span in sorted(spans, key=self._span_key):
            if size >= limit:
                break
            chosen.add(span)
            size += span.stop - span.start
        return [span for span in spans if span in chosen]

    def _span_key(self, span: Span) -> tuple[bytes, Span]:
        name = os.path.basename(self._sources[span.source].path)
        words = f"{self._settings.seed} {span.start} {span.stop} {name}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(words, digest_size=8).digest(), span

    def _read(self, span: Span, progress: Progress) -> None:
        source, counts = self._sources[span.source], self._counts
        told_bytes, told_documents, told = 0, counts.documents, time.monotonic()
        with self._meter(source, span) as meter:
            for item in read_span(source, meter, self._options):
                self._take(item, source, span)
                if time.monotonic() - told >= _EVERY_S:
                    done = min(max(meter.position - span.start, told_bytes), span.stop - span.start)
                    progress.add(done - told_bytes, counts.documents - told_documents)
                    told_bytes, told_documents, told = done, counts.documents, time.monotonic()
        source.check_unchanged()
        counts.input_bytes += span.stop - span.start
        progress.add(span.stop - span.start - told_bytes, counts.documents - told_documents)

    def _meter(self, source: Source, span: Span) -> Meter:
        try:
            return open_meter(source, span.start, span.stop, self._options, BLOCK_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror}") from None

    def _take(self, item: Document | Fault | LeftOut, source: Source, span: Span) -> None:
        counts = self._counts
        (self._bad if isinstance(item, Fault) else self._good)[source.path] += 1
        if isinstance(item, LeftOut):
            counts.left_out[item.reason] = counts.left_out.get(item.reason, 0) + 1
        elif isinstance(item, Fault):
            self._fault(item, source, span)
        elif not item.text or item.text.isspace():
            counts.empty += 1
        else:
            self._reservoir.add(item.text)
            counts.documents += 1
            counts.text_bytes += len(item.text.encode("utf-8"))

    def _fault(self, fault: Fault, source: Source, span: Span) -> None:
        stops = self._settings.on_error == "stop"
        self._counts.skipped += 1
        if not stops and len(self._counts.faults) >= _NAMED_FAULTS:
            return
        source.check_unchanged()
        line = fault.line + (newlines_before(source.path, span.start) if source.has_lines else 0)
        where = f"{source.path}:{line}" if line else source.path
        if stops:
            raise UserError(f"{where}: {fault.message}; nothing is written (--on-error skip leaves such records out "
                            "and counts them)")
        self._counts.faults.append(f"{where}: {fault.message}")
