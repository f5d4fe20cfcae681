"""The work folder PREFIX.work: finished shards, kept until the corpus is in place, so that a killed run goes on.

A shard is the files of Job.parts, as NNNNNNN.bin, and NNNNNNN.json, put in place last: where the JSON is, the shard is
whole. Each run draws a token and leaves it in the folder; a process that outlives its run
finds another there and throws its shard away.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.data.claim import claim, empty, remove, sync, sync_folder
from engine.data.indexed import with_suffix
from engine.data.pipeline.job import Job
from engine.errors import UserError


class Shards:
    """The shards in a work folder, for a process that makes or reads them."""

    def __init__(self, folder: str | Path, token: str) -> None:
        self.folder, self.token = Path(folder), token

    def path(self, unit: int, part: str) -> Path:
        """Where a part of a finished shard lies."""
        return self.folder / f"{unit:07d}.{part}"

    def draft(self, unit: int, part: str, pid: int | None = None) -> Path:
        """Where process `pid`, by default this one, writes it before, apart from every other."""
        return self.folder / f"{unit:07d}.{part}.{self.token}.{pid or os.getpid()}"

    def write_about(self, unit: int, about: Mapping[str, Any]) -> None:
        """Writes the draft of a shard's JSON, in ASCII: names of files may have no UTF-8; its crc32 is a second line.
        Raises OSError."""
        text = json.dumps(about)
        self.draft(unit, "json").write_text(f"{text}\n{zlib.crc32(text.encode('ascii'))}\n", encoding="ascii")

    def publish(self, unit: int, parts: Sequence[str], pid: int | None = None) -> None:
        """Puts a shard in place that process `pid` has written: its files are on the disk before the JSON that vouches
        for them. Raises UserError."""
        names = (*parts, "json")
        try:
            for part in names:
                with open(self.draft(unit, part, pid), "rb") as file:
                    os.fsync(file.fileno())
            if not self.is_current():
                raise UserError(f"another run has taken over {self.folder}")
            for part in names:
                os.replace(self.draft(unit, part, pid), self.path(unit, part))
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def discard_drafts(self, unit: int, parts: Sequence[str]) -> None:
        """Removes what this process has written of a shard and not published."""
        for part in (*parts, "json"):
            self.draft(unit, part).unlink(missing_ok=True)

    def is_current(self) -> bool:
        """Whether the run that drew our token still owns the folder."""
        try:
            return (self.folder / "run").read_text() == self.token
        except OSError:
            return False

    def about(self, unit: int) -> dict[str, Any]:
        """A finished shard's JSON."""
        return json.loads(self.path(unit, "json").read_bytes().splitlines()[0])  # type: ignore[no-any-return]

    def finished(self, unit: int) -> bool:
        """Whether a shard is whole: its JSON is there as it was written, and its files have the sizes it tells."""
        try:
            text, crc = self.path(unit, "json").read_bytes().splitlines()
            if zlib.crc32(text) != int(crc):
                return False
            sizes = self.about(unit)["sizes"]
            return all(self.path(unit, part).stat().st_size == size for part, size in sizes.items())
        except (OSError, ValueError, KeyError, AttributeError):
            return False

    def undo(self, unit: int) -> None:
        """Makes a shard one that is not finished."""
        self.path(unit, "json").unlink(missing_ok=True)

    def count(self) -> int:
        """The number of shards in place."""
        return sum(1 for entry in os.scandir(self.folder) if entry.name.endswith(".json") and entry.name != "job.json")


class Work(Shards):
    """The work folder as the run that owns it sees it; a context manager that holds its lock."""

    def __init__(self, prefix: str) -> None:
        """Raises UserError when the folder cannot be written or another run is at work in it."""
        self._prefix = prefix
        folder = with_suffix(prefix, ".work")
        self.lock = claim(folder, clear=False)
        super().__init__(folder, secrets.token_hex(8))
        self.keep = True

    def differences(self, job: Job) -> list[str] | None:
        """Why the folder's shards are of no use to a job, none if they are; None: there is no job in it."""
        if not (self.folder / "job.json").exists():
            return None
        try:
            return job.differences(Job.load(self.folder / "job.json"))
        except UserError as error:
            return [str(error)]

    def begin(self, job: Job) -> None:
        """Makes the folder this job's: shards of the same job stay, of another they go. Raises UserError."""
        try:
            (self.folder / "run").write_text(self.token)
            if self.differences(job) != []:
                empty(self.folder, "lock", "run")
            for draft in self.folder.glob("*.*.*.*"):
                draft.unlink(missing_ok=True)
            job.save(self.folder / "job.json.new")
            os.replace(self.folder / "job.json.new", self.folder / "job.json")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None

    def placing(self) -> bool:
        """Whether a run of the job in the folder was putting its output in place when it ended."""
        return (self.folder / "placing").exists()

    def place(self) -> None:
        """Notes that output from now on may lie there in part, and is this job's."""
        with open(self.folder / "placing", "wb") as file:
            sync(file)
        sync_folder(self.folder)

    def discard(self) -> None:
        """Marks the folder to be removed at the end."""
        self.keep = False

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leaves the folder where a later run can use it, that is, where it holds a shard."""
        with contextlib.suppress(OSError):
            if not self.keep or self.count() == 0:
                remove(self.folder)
        self.lock.close()
