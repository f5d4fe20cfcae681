"""Raw text to P.bin, P.idx and P.json: the same bytes for any number of workers, in memory that does not grow.

Reading cuts the input into chunks of raw records; chunks are parsed and encoded, here or in worker processes, and
written in the order of the input. Shuffling is a second pass: the documents, encoded in order into a temporary corpus,
are copied from its memory map in an order computed from the seed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.indexed import IndexedDataset, IndexedWriter, token_dtype, with_suffix
from engine.data.progress import Progress
from engine.data.readers import BadRecord, Fault, Record, Source, parse
from engine.data.samples import mix, permute
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer

DEFAULT_SEED = 1234
_CHUNK_BYTES = 256 << 10
_SMALL_INPUT = 2 << 20  # below this, starting processes takes longer than the work
_COPY_TOKENS = 4 << 20
_NAMED_FAULTS = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to turn into tokens, and how."""

    inputs: Sequence[str]
    tokenizer: str
    output_prefix: str
    json_key: str = "text"
    split_text: str = "document"
    """What a document is in plain text: "document" (the file), "line", or "blank" (between blank lines)."""
    shuffle_seed: int | None = DEFAULT_SEED
    """None keeps the input's order."""
    append_eod: bool = True
    """Ends each document with the tokenizer's end-of-document token."""
    on_error: str = "stop"
    """"stop" at the first bad record, writing nothing, or "skip" and count it."""
    workers: int | None = None
    """Processes; None: one a core. The output does not depend on it."""
    overwrite: bool = False


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


@dataclass(frozen=True)
class _Chunk:
    source: int
    is_json: bool
    records: list[Record]


@dataclass(frozen=True)
class _Encoded:
    source: int
    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int = 0
    empty: int = 0
    faults: Sequence[Fault] = ()


def preprocess(settings: Settings, say: Callable[[str], None] = print) -> Counts:
    """Writes the corpus. Raises UserError, leaving nothing behind, for bad input, a bad record (on_error "stop"), an
    output that exists, equals an input or cannot be written, or a worker that dies."""
    sources = [Source(path) for path in settings.inputs]
    _check(settings, sources)
    tokenizer = load_tokenizer(settings.tokenizer)
    say(_eod_line(settings, tokenizer))
    with IndexedWriter(settings.output_prefix, tokenizer.vocab_size) as writer:
        if settings.shuffle_seed is None:
            counts = _encode_all(settings, sources, tokenizer, writer)
        else:
            spool = writer.folder / "in-order"
            with IndexedWriter(spool, tokenizer.vocab_size) as first:
                counts = _encode_all(settings, sources, tokenizer, first)
                first.finish()
            copy_shuffled(IndexedDataset(spool), writer, settings.shuffle_seed)
        if counts.documents == 0:
            raise UserError(
                f"no document is left of {len(sources)} file(s): {counts.empty} empty, {counts.skipped} skipped"
            )
        writer.finish(_describe(settings, sources, tokenizer, counts))
    return counts


def copy_shuffled(source: IndexedDataset, writer: IndexedWriter, seed: int) -> None:
    """Copies all documents (one sequence each) in an order that depends on the seed and their number alone."""
    total, at, step = source.documents, 0, 1024
    item = source.dtype.itemsize
    while at < total:
        order = permute(np.arange(at, min(at + step, total)), total, mix(seed))
        lengths = source.sizes[order].astype(np.int64)
        # As many of them as fit in the budget, at least one: documents may be long.
        take = max(1, int(np.searchsorted(np.cumsum(lengths), _COPY_TOKENS, side="right")))
        order, lengths = order[:take], lengths[:take]
        starts = source.pointers[order] // item
        ends = np.cumsum(lengths)
        gather = np.arange(int(ends[-1])) + np.repeat(starts - (ends - lengths), lengths)
        writer.add_documents(source.tokens[gather], lengths)
        at += take


def _check(settings: Settings, sources: Sequence[Source]) -> None:
    """Everything that can be refused before work starts."""
    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"workers {settings.workers} must be at least 1")
    prefix = settings.output_prefix
    outputs = [with_suffix(prefix, suffix) for suffix in (".bin", ".idx", ".json")]
    for source in sources:
        if source.path.resolve() in [path.resolve() for path in outputs]:
            raise UserError(f"{source.path} is an input and would be overwritten; choose another --output-prefix")
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not settings.overwrite:
        raise UserError(f"{', '.join(existing)} exists; choose another --output-prefix or say --overwrite")
    if not os.path.basename(prefix) or Path(prefix).is_dir():
        raise UserError(f"{prefix} is a folder; an output prefix ends in a name: {os.path.join(prefix, 'corpus')}")
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {Path(prefix).parent}: {error.strerror}") from None


def _eod_line(settings: Settings, tokenizer: Tokenizer) -> str:
    if not settings.append_eod:
        return "documents are NOT separated: no end-of-document token is appended (--no-append-eod)"
    if tokenizer.eos_id is None:
        raise UserError(
            f"{settings.tokenizer} has no end-of-sequence token to separate documents with; name one in its "
            "tokenizer_config.json (eos_token) or use --no-append-eod"
        )
    return f"each document ends with the end-of-document token, id {tokenizer.eos_id}"


def _encode_all(
    settings: Settings, sources: Sequence[Source], tokenizer: Tokenizer, writer: IndexedWriter
) -> Counts:
    """Encodes every document in the order of the input."""
    counts = Counts()
    eod = tokenizer.eos_id if settings.append_eod else None
    work = partial(_encode, json_key=settings.json_key, eod=eod, dtype=writer.dtype.str)
    total = sum(source.size for source in sources)
    workers = settings.workers or _cores()
    chunks = _chunks(sources, settings.split_text)
    if workers == 1 or total < _SMALL_INPUT:
        results = _here(chunks, partial(work, tokenizer=tokenizer))
    else:
        results = _in_processes(chunks, work, settings.tokenizer, workers)
    with Progress(total) as progress, contextlib.closing(results):
        for result in results:
            _account(result, counts, settings.on_error, sources[result.source].path)
            writer.add_documents(result.ids, result.lengths)
            progress.update(sum(source.position for source in sources), counts.documents)
    return counts


def _cores() -> int:
    """The cores this process may use (macOS cannot say, and gives all)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _account(result: _Encoded, counts: Counts, on_error: str, path: Path) -> None:
    for fault in result.faults:
        named = f"{path}:{fault.line}: {fault.message}"
        if on_error == "stop":
            raise UserError(f"{named}; nothing is written (--on-error skip leaves such records out and counts them)")
        counts.skipped += 1
        if len(counts.faults) < _NAMED_FAULTS:
            counts.faults.append(named)
    counts.documents += len(result.lengths)
    counts.tokens += len(result.ids)
    counts.text_bytes += result.text_bytes
    counts.empty += result.empty


def _chunks(sources: Sequence[Source], split_text: str) -> Iterator[_Chunk | _Encoded]:
    """The input in order: records in chunks, and places that could not be read as results without documents."""
    for number, source in enumerate(sources):
        held: list[Record] = []
        size = 0
        for item in source.records(split_text):
            if isinstance(item, Record):
                held.append(item)
                size += len(item.data) + 64
            if size >= _CHUNK_BYTES or (isinstance(item, Fault) and held):
                yield _Chunk(number, source.is_json, held)
                held, size = [], 0
            if isinstance(item, Fault):
                yield _Encoded(number, np.empty(0, np.int64), np.empty(0, np.int64), faults=[item])
        if held:
            yield _Chunk(number, source.is_json, held)


def _encode(chunk: _Chunk, *, tokenizer: Tokenizer, json_key: str, eod: int | None, dtype: str) -> _Encoded:
    """Parses and encodes a chunk. Ids are checked against the vocabulary by the writer."""
    ids: list[np.ndarray] = []
    faults: list[Fault] = []
    empty = text_bytes = 0
    end = [] if eod is None else [eod]
    for record in chunk.records:
        try:
            text = parse(record.data, chunk.is_json, json_key)
        except BadRecord as error:
            faults.append(Fault(record.line, str(error)))
            continue
        if text is None:
            continue
        tokens = tokenizer.encode(text) if text.strip() else []
        if not tokens:
            empty += 1
            continue
        ids.append(np.array(tokens + end, dtype=dtype))
        text_bytes += len(text.encode("utf-8"))
    lengths = np.array([len(document) for document in ids], dtype=np.int64)
    flat = np.concatenate(ids) if ids else np.empty(0, dtype)
    return _Encoded(chunk.source, flat, lengths, text_bytes, empty, faults)


def _here(chunks: Iterator[_Chunk | _Encoded], work: Callable[[_Chunk], _Encoded]) -> Generator[_Encoded, None, None]:
    for chunk in chunks:
        yield chunk if isinstance(chunk, _Encoded) else work(chunk)


def _in_processes(
    chunks: Iterator[_Chunk | _Encoded], work: Callable[..., _Encoded], tokenizer: str, workers: int
) -> Generator[_Encoded, None, None]:
    """Results in the order of the chunks. Each worker hangs on a pipe of its own, so that a death on either side is an
    end of file on the other at once; the standard library's pools can wait for ever for a worker that was killed."""
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, tokenizer), daemon=True)
            process.start()
            theirs.close()  # the worker holds the only copy now
            team[ours] = process
        yield from _in_order(chunks, list(team))
    except _WorkerDied:
        raise UserError(
            f"one of the {workers} worker processes died (killed, or out of memory); nothing is written; "
            "try again with fewer --workers"
        ) from None
    finally:
        for pipe, process in team.items():
            pipe.close()
            process.terminate()
            process.join()


def _in_order(chunks: Iterator[_Chunk | _Encoded], idle: list[Connection]) -> Generator[_Encoded, None, None]:
    """Gives each idle worker a chunk and hands on the results in order, a bounded number waiting for their turn."""
    window = 4 * len(idle)
    busy: dict[Connection, int] = {}
    done: dict[int, _Encoded] = {}
    given = taken = 0
    more = True
    while more or busy:
        while more and idle and given - taken < window:
            chunk = next(chunks, None)
            if chunk is None:
                more = False
                break
            if isinstance(chunk, _Encoded):
                done[given] = chunk
            else:
                _send(idle[-1], chunk)
                busy[idle.pop()] = given
            given += 1
        for pipe in wait(list(busy)) if busy else ():
            done[busy.pop(pipe)] = _receive(pipe)  # type: ignore[call-overload]
            idle.append(pipe)  # type: ignore[arg-type]
        while taken in done:
            yield done.pop(taken)
            taken += 1


class _WorkerDied(Exception):
    """The other end of a worker's pipe is gone."""


def _send(pipe: Connection, chunk: _Chunk) -> None:
    try:
        pipe.send(chunk)
    except OSError:
        raise _WorkerDied from None


def _receive(pipe: Any) -> _Encoded:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise _WorkerDied from None


def _serve(pipe: Connection, work: Callable[..., _Encoded], tokenizer: str) -> None:
    """A worker: encodes chunks until the pipe ends, as it also does when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process' to handle
    loaded = load_tokenizer(tokenizer)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(work(pipe.recv(), tokenizer=loaded))


def _describe(settings: Settings, sources: Sequence[Source], tokenizer: Tokenizer, counts: Counts) -> dict[str, Any]:
    """P.json: everything that decides the bytes, and nothing else (no times, no paths, no number of workers)."""
    return {
        "format": "triax-corpus",
        "version": 1,
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "eod_id": tokenizer.eos_id if settings.append_eod else None,
        "counts": {
            "documents": counts.documents,
            "tokens": counts.tokens,
            "text_bytes": counts.text_bytes,
            "empty": counts.empty,
            "skipped": counts.skipped,
        },
        "settings": {
            "json_key": settings.json_key,
            "split_text": settings.split_text,
            "shuffle_seed": settings.shuffle_seed,
            "append_eod": settings.append_eod,
            "on_error": settings.on_error,
        },
        "inputs": [{"name": s.path.name, "size": s.size, "sha256": s.sha256} for s in sources],
    }
