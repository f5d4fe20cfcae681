"""A job: everything that decides what the shards hold, written down so that any process can work on it, and a later
run can tell whether it is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.data.dedup import parse_method
from engine.data.indexed import token_dtype
from engine.data.inputs import ReadOptions, Source, Unit, find_sources, plan, unit_bytes_of
from engine.data.inputs.meter import BLOCK_BYTES
from engine.data.pipeline.settings import Settings
from engine.data.pipeline.steps import parse_cleaning, parse_rules
from engine.errors import UserError
from engine.tokenizer import Tokenizer

VERSION = 2
"""Of the shards. A change in what they hold makes another job of the same settings."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is read, how, and by which vocabulary. on_error is not compared: finished shards had no bad record, or
    were told to skip it."""

    version: int
    tokenizer: str
    tokenizer_hash: str
    dtype: str
    eod_id: int | None
    json_key: str
    split_text: str
    clean: str
    quality: str
    dedup: str
    unit_bytes: int
    on_error: str
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, settings: Settings, tokenizer: Tokenizer) -> Job:
        """Raises UserError for inputs that are missing or unknown, and for settings that name nothing."""
        for check, spec in ((parse_cleaning, settings.clean), (parse_rules, settings.quality),
                            (parse_method, settings.dedup)):
            check(spec)
        sources = tuple(find_sources(settings.inputs, settings.encoding))
        return cls(
            version=VERSION,
            tokenizer=os.path.abspath(settings.tokenizer),
            tokenizer_hash=tokenizer.hash,
            dtype=token_dtype(tokenizer.vocab_size).str,
            eod_id=tokenizer.eos_id if settings.append_eod else None,
            json_key=settings.json_key,
            split_text=settings.split_text,
            clean=settings.clean,
            quality=settings.quality,
            dedup=settings.dedup,
            unit_bytes=_whole_blocks(settings.unit_bytes or unit_bytes_of(sum(source.size for source in sources))),
            on_error=settings.on_error,
            sources=sources,
        )

    @property
    def read_options(self) -> ReadOptions:
        """How documents are told apart."""
        return ReadOptions(json_key=self.json_key, split_text=self.split_text)

    @property
    def parts(self) -> tuple[str, ...]:
        """The files of a shard: token ids, i4 lengths; to find duplicates also signatures and bytes of text."""
        return ("bin", "len") if self.dedup == "none" else ("bin", "len", "sig", "bytes")

    @property
    def block_bytes(self) -> int:
        """The size of the blocks a file's digest is made of; a unit holds a whole number of them."""
        return min(self.unit_bytes, BLOCK_BYTES)

    @property
    def input_bytes(self) -> int:
        """Of all files, compressed ones as they lie."""
        return sum(source.size for source in self.sources)

    def units(self) -> list[Unit]:
        """The work, in the input's order."""
        return plan(self.sources, self.split_text, self.unit_bytes)

    def save(self, path: Path) -> None:
        """Writes the job as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        """Raises UserError when the file holds no job of this version."""
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sources = tuple(Source(**source) for source in found.pop("sources"))
            return cls(**found, sources=sources)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def differences(self, other: Job) -> list[str]:
        """What makes shards of another job useless for this one, in words."""
        return list(self._differences(other))

    def _differences(self, other: Job) -> Iterator[str]:
        mine, theirs = ({source.path: source for source in job.sources} for job in (self, other))
        changed = [path for path in mine if path in theirs and mine[path] != theirs[path]]
        if changed:
            yield f"{changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''} changed"
        if [source.path for source in self.sources] != [source.path for source in other.sources]:
            yield f"the inputs are {len(mine)} files, not the same {len(theirs)}"
        if self.tokenizer_hash != other.tokenizer_hash:
            yield "the tokenizer is another"
        for name in ("version", "dtype", "eod_id", "json_key", "split_text", "clean", "quality", "dedup", "unit_bytes"):
            if getattr(self, name) != getattr(other, name):
                yield f"{name} was {getattr(other, name)} and is {getattr(self, name)}"


def _whole_blocks(size: int) -> int:
    """A size, brought up to whole blocks of a file's digest where it is larger than one."""
    return size if size <= BLOCK_BYTES else -(-size // BLOCK_BYTES) * BLOCK_BYTES
