"""Raw text to P.bin, P.idx and P.json: the same bytes for any number of workers, in memory that does not grow.

The input is planned in units that depend on the files alone. A unit is read, parsed and encoded by one process, which
leaves a shard in PREFIX.work; a run that is killed goes on with the missing ones. At the end the shards are merged in
the order asked for, and the work folder goes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data.indexed import IndexedWriter, with_suffix
from engine.data.inputs import Source
from engine.data.inputs.source import UNFINISHED
from engine.data.pipeline import DEFAULT_SEED, Counts, Settings, mpi
from engine.data.pipeline.job import Job
from engine.data.pipeline.merge import Merge
from engine.data.pipeline.shard import ShardMaker
from engine.data.pipeline.team import run_team
from engine.data.pipeline.work import Work
from engine.data.progress import Progress
from engine.data.quality_report import report_paths
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer

__all__ = ["DEFAULT_SEED", "HOW_TO_GET_ONE", "Counts", "Settings", "prepare", "preprocess"]

HOW_TO_GET_ONE = ("give the folder of a model (with its tokenizer.model or tokenizer.json), or train a vocabulary on "
                  "your text: python tools/train_tokenizer.py --input F --vocab-size 32000 --output DIR")
_SMALL_INPUT = 2 << 20  # below this, starting processes takes longer than the work


def preprocess(settings: Settings, say: Callable[[str], None] = print) -> Counts | None:
    """Runs `prepare` in this process and its workers, or by all ranks of an MPI launcher: then the other ranks than 0
    give None, and a rank that fails says so and ends the job with code 2."""
    comm = mpi.world()
    if comm is None:
        return prepare(settings, say)
    with mpi.aborting(comm):
        if comm.Get_rank() > 0:
            mpi.follow(comm, settings.output_prefix)
            return None
        counts = prepare(settings, say, comm)
        mpi.finish(comm)
        return counts


def prepare(settings: Settings, say: Callable[[str], None] = print, comm: Any = None) -> Counts:
    """Writes the corpus. Raises UserError, leaving no output, for bad input, a bad record (on_error "stop"), an
    output that exists, equals an input or cannot be written, or a worker that dies. What is finished stays in
    PREFIX.work, also at KeyboardInterrupt, for the next run of the same job."""
    if settings.unit_bytes is not None and settings.unit_bytes < 1:
        raise UserError(f"a unit of {settings.unit_bytes} bytes must be at least 1")
    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"workers {settings.workers} must be at least 1")
    if not os.path.exists(settings.tokenizer):
        raise UserError(f"no tokenizer at {settings.tokenizer}: {HOW_TO_GET_ONE}")
    _make_folder(settings.output_prefix)
    tokenizer = load_tokenizer(settings.tokenizer)
    job = Job.of(settings, tokenizer)
    _check_paths(settings.output_prefix, job.sources)
    reports = _report_paths(settings, job.sources, tokenizer)
    with Work(settings.output_prefix) as work:
        _check_output(settings, work, job, reports)
        _announce(settings, job, tokenizer, work, say)
        work.begin(job)
        try:
            _make_shards(settings, job, work, tokenizer, comm)
        except (UserError, KeyboardInterrupt) as error:
            raise _with_way_on(error, work, job) from None
        return _merge(settings, job, work, tokenizer)


def _make_folder(prefix: str) -> None:
    if not os.path.basename(prefix) or os.path.isdir(prefix):
        raise UserError(f"{prefix} is a folder; an output prefix ends in a name: {os.path.join(prefix, 'corpus')}")
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {Path(prefix).parent}: {error.strerror}") from None


def _outputs(prefix: str) -> list[Path]:
    return [with_suffix(prefix, suffix) for suffix in (".bin", ".idx", ".json")]


def _check_paths(prefix: str, sources: Sequence[Source]) -> None:
    taken = [path.resolve() for path in _outputs(prefix)]
    folders = [with_suffix(prefix, suffix).resolve() for suffix in UNFINISHED]
    for source in sources:
        path = Path(source.path).resolve()
        if path in taken or any(folder in path.parents for folder in folders):
            raise UserError(f"{source.path} is an input and would be overwritten; choose another --output-prefix")


def _report_paths(settings: Settings, sources: Sequence[Source], tokenizer: Tokenizer) -> list[Path]:
    """The files of the report, if one is asked for. Raises UserError where they cannot be, or are other files of the
    run."""
    if settings.report is None:
        return []
    found = list(report_paths(settings.report))
    taken: list[str | Path] = [source.path for source in sources]
    taken += [*_outputs(settings.output_prefix), *tokenizer.files.values()]
    kept = {os.path.realpath(path) for path in taken}
    for path in found:
        if os.path.realpath(path) in kept:
            raise UserError(f"the report would overwrite {path}, another file of this run; choose another --report")
        if os.path.isdir(path) or not os.path.isdir(path.parent):
            reason = "it is a folder" if os.path.isdir(path) else "no such folder"
            raise UserError(f"cannot write the report {path}: {reason}")
    return found


def _check_output(settings: Settings, work: Work, job: Job, reports: Sequence[Path]) -> None:
    """Refuses to overwrite a corpus or a report, but for what a killed run of this job was putting in place."""
    ours = work.placing() and work.differences(job) == []
    for paths, name in ((_outputs(settings.output_prefix), "--output-prefix"), (reports, "--report")):
        existing = [str(path) for path in paths if path.exists()]
        if existing and not settings.overwrite and not ours:
            raise UserError(f"{', '.join(existing)} exists; choose another {name} or say --overwrite")


def _announce(settings: Settings, job: Job, tokenizer: Tokenizer, work: Work, say: Callable[[str], None]) -> None:
    """One line each: the inputs, the end-of-document token, what another run left."""
    units = len(job.units())
    say(f"{len(job.sources):,} input files, {job.input_bytes / 1e6:,.1f} MB, in {units:,} parts")
    say(f"encoder: {tokenizer.describe()}")
    if not settings.append_eod:
        say("documents are NOT separated: no end-of-document token is appended (--no-append-eod)")
    elif tokenizer.eos_id is None:
        raise UserError(
            f"{settings.tokenizer} has no end-of-sequence token to separate documents with; name one in its "
            "tokenizer_config.json (eos_token) or use --no-append-eod"
        )
    else:
        say(f"each document ends with the end-of-document token, id {tokenizer.eos_id}")
    reasons = work.differences(job)
    if reasons:
        say(f"{work.folder} holds another job's work, which is removed: {'; '.join(reasons)}")
    elif reasons is not None:
        say(f"{work.folder} is continued: {work.count():,} of {units:,} parts are finished")


def _make_shards(settings: Settings, job: Job, work: Work, tokenizer: Tokenizer, comm: Any) -> None:
    """Makes the shards that are missing."""
    units = job.units()
    sizes = [sum(span.stop - span.start for span in unit) for unit in units]
    missing = [number for number in range(len(units)) if not _is_made(work, job, number)]
    left = sum(sizes[number] for number in missing)
    workers = min(settings.workers or cores(), len(missing))
    if comm is not None:
        left = sum(sizes[number] for number in missing[:: comm.Get_size()])
    maker = ShardMaker(job, work, tokenizer)

    def verify() -> None:
        tokenizer.verify_sample(maker.sample())

    with Progress(left) as progress:
        if comm is not None:
            verify()
            mpi.lead(comm, work, missing, maker, progress.add)
        elif workers <= 1 or left < _SMALL_INPUT:
            verify()
            for number in missing:
                maker.make(number, progress.add)
        else:
            run_team(maker, work, missing, workers, progress.add, verify)


def _is_made(work: Work, job: Job, number: int) -> bool:
    """Whether a unit's shard is there and of use: not one that left bad records out, where these are to stop a run."""
    return work.finished(number) and (job.on_error == "skip" or not work.about(number)["skipped"])


def _with_way_on(error: BaseException, work: Work, job: Job) -> BaseException:
    """The error, with what is kept and how to go on where something is."""
    kept = f"{work.count():,} of {len(job.units()):,} parts are kept in {work.folder}"
    if work.count() == 0:
        return error
    if isinstance(error, KeyboardInterrupt):
        print(f"\ninterrupted: {kept}; the same command goes on from there", file=sys.stderr)
        return error
    return UserError(f"{error}; {kept} for the same command to go on")


def _merge(settings: Settings, job: Job, work: Work, tokenizer: Tokenizer) -> Counts:
    """Puts the corpus in place. Raises UserError when nothing is left of the input, and when the disk is full."""
    try:
        return _put_in_place(settings, job, work, tokenizer)
    except OSError as error:
        raise UserError(
            f"cannot write {settings.output_prefix}: {error.strerror or error}; the same command goes on from "
            f"{work.folder} when that is mended"
        ) from None


def _put_in_place(settings: Settings, job: Job, work: Work, tokenizer: Tokenizer) -> Counts:
    merge = Merge(job, work, settings.memory_bytes)
    counts = merge.counts()
    if counts.documents == 0:
        if settings.report:
            merge.report.write(settings.report)
        work.discard()
        raise UserError(
            f"no document is left of {len(job.sources)} file(s): {counts.empty} empty, {counts.skipped} skipped, "
            f"{sum(counts.dropped.values())} dropped by rules, {sum(counts.left_out.values())} pages no articles"
        )
    with IndexedWriter(settings.output_prefix, tokenizer.vocab_size) as writer:
        merge.write(writer, counts.documents, settings.shuffle_seed)
        work.place()
        if settings.report:
            merge.report.write(settings.report)
        writer.finish(merge.describe(settings, tokenizer, counts))
    work.discard()
    return counts


def cores() -> int:
    """The cores this process may use (macOS cannot say, and gives all)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
