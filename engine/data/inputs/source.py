"""Input files: found by name, folder or pattern; what each holds, by its name's ending and its first bytes."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from stat import S_ISREG

from engine.data.encoding import (
    codec_of,
    declared_encoding,
    is_bare_utf16,
    lines_are_bytes,
    marked_encoding,
)
from engine.data.inputs.parquet import check_parquet
from engine.data.unpack import BROKEN, COMPRESSIONS, NAMES, TooDemanding, broken, open_stream, packed_by
from engine.data.wiki import dump_head, is_dump, read_site
from engine.errors import UserError, nearest, shown
from engine.signature import described, first_bytes, refuse_pointer, what_it_is

UNFINISHED = (".work", ".partial")
"""Endings of the folders that runs of the preparation leave beside their output while they last."""
SPLITS = ("document", "line", "blank")
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text", ".text": "text", ".md": "text",
    ".parquet": "parquet", ".xml": "dump",
}  # fmt: skip
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # a message with such a name would not be one line
_IN_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_UTF_16 = "looks like UTF-16 without a byte-order mark; say --encoding utf-16-le (or -be)"


@dataclass(frozen=True)
class Source:
    """One input file.

    kind: "jsonl", "json" (an array), "text", "parquet" or "dump"; compression: "", "gz", "bz2" or "zst"; encoding: the
    name of a codec; size in bytes and mtime in ns as they were when the job began."""

    path: str
    kind: str
    compression: str
    encoding: str
    size: int
    mtime_ns: int

    @property
    def has_lines(self) -> bool:
        """Whether documents are found again by a line, counted over the spans of the file."""
        return self.kind not in ("parquet", "dump")

    @property
    def lines_are_bytes(self) -> bool:
        """Whether lines can be told apart before decoding."""
        return lines_are_bytes(self.encoding)

    def check_unchanged(self) -> None:
        """Raises UserError when the file is no longer what it was when the job began."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more: {error.strerror}") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise UserError(
                f"{self.path} was changed while it was read ({self.size:,} bytes at the start, {now.st_size:,} now); "
                "run again when it is at rest"
            )


def find_sources(inputs: Sequence[str], encoding: str = "utf-8") -> list[Source]:
    """The files named, in the order given; folders and patterns give theirs sorted, hidden files left out.

    encoding: of text without a byte-order mark. Raises UserError for a file that is missing or of an unknown kind, a
    pattern or folder without any, a file given twice, and an unknown encoding."""
    codec = _codec(encoding)
    sources: list[Source] = []
    seen: dict[tuple[int, int], Source] = {}
    refused: list[str] = []
    for given in inputs:
        for path in _expand(given):
            try:
                source = _source(path, codec)
            except UserError as error:
                refused.append(str(error))
                continue
            stat = os.stat(path)
            first = seen.setdefault((stat.st_dev, stat.st_ino), source)
            if first is not source:
                also = f" and {first.path} are one file" if first.path != path else " is given twice"
                raise UserError(f"{path}{also}; its documents would be there twice")
            sources.append(source)
    if refused:
        more = f" (and {len(refused) - 1:,} more of the inputs cannot be read: {refused[1]})" if refused[1:] else ""
        raise UserError(refused[0] + more)
    return sources


def _codec(name: str) -> str:
    codec = codec_of(name)
    if codec is None:
        hint = nearest(name, ("utf-8", "utf-16", "latin-1", "cp1252", "gb18030", "gbk", "big5", "shift_jis", "koi8-r"))
        raise UserError(f"unknown --encoding {shown(name)}" + (f"; did you mean {hint}?" if hint else ""))
    return codec


def _expand(given: str) -> Iterable[str]:
    if os.path.isdir(given):
        found = sorted(_inside(given))
        if not found:
            raise UserError(f"{given} holds no file that can be read; known are {_endings()}")
        return found
    if os.path.exists(given) or not glob.has_magic(given):
        return [given]
    found = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
    if not found:
        raise UserError(f"no file matches {given}")
    return found


def _inside(folder: str) -> Iterator[str]:
    """The files below a folder that are input: of a known kind, not hidden, and no run's unfinished work. Links to
    folders are followed, each folder is gone through once. Raises UserError for one that cannot be read."""
    seen = {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        paths = [os.path.join(parent, name) for name in files if not name.startswith(".") and _kind(name)[0]]
        yield from filter(os.path.isfile, paths)
        below = sorted(name for name in folders if not name.startswith(".") and not name.endswith(UNFINISHED))
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in below}
        folders[:] = [name for name in below if real[name] not in seen]
        seen.update(real.values())


def _kind(name: str) -> tuple[str | None, str, str]:
    """(kind or None, compression, ending) of a file's name."""
    stem, ending = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
    return KINDS.get(ending), compression, ending


def _endings() -> str:
    return f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"


def _source(path: str, encoding: str) -> Source:
    kind, compression, ending = _kind(os.path.basename(path))
    if _CONTROL.search(path):
        name = path.encode("unicode_escape").decode()
        raise UserError(f"the file {name} has control characters in its name; rename it")
    try:
        stat = os.stat(path)
        if not S_ISREG(stat.st_mode):
            raise UserError(f"{path} is no file that can be read twice and from the middle (a pipe or a device)")
        refuse_pointer(path)
        raw = first_bytes(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if kind is None and ending in (".bin", ".idx") and os.path.exists(f"{path.removesuffix(ending)}.idx"):
        raise UserError(f"{path} is of a corpus of token ids already: train on it with --data "
                        f"{shown(path.removesuffix(ending))}, or join it with others by tools/merge_datasets.py")
    if kind is None:
        raise UserError(f"{path} ends in {ending or 'nothing'}; known are {_endings()}{_advice(ending)}")
    if compression and kind == "parquet":
        raise UserError(f"{path}: parquet is compressed inside and read at random; unpack the file first")
    if kind == "parquet":
        check_parquet(path)
    elif kind == "dump":
        encoding = _encoding_of_dump(path, encoding)
    else:
        _check_packing(path, kind, compression, raw)
        head = _first_bytes(path, compression)
        encoding = _encoding_of(path, head, encoding)
        if kind == "json" and not _begins_array(head, encoding):
            kind = "jsonl"
    return Source(path, kind, compression, encoding, stat.st_size, stat.st_mtime_ns)


def _advice(ending: str) -> str:
    if ending in (".csv", ".tsv"):
        return "; write its rows as .jsonl, one object a line, or as .parquet"
    hint = nearest(ending, KINDS)
    return f"; did you mean {hint}?" if hint else ""


def _check_packing(path: str, kind: str, compression: str, head: bytes) -> None:
    """Raises UserError where the first bytes show that a file is not what its name says."""
    found = packed_by(head)
    if compression and found != compression:
        hint = f"; end its name in {_ending_of(found)}" if found else ""
        raise UserError(f"{path} is no {NAMES[compression]} file: it {described(path)}{hint}")
    if not compression and found and _IN_NO_TEXT.search(head):
        raise UserError(f"{path} is {NAMES[found]}, not plain {kind}: end its name in {_ending_of(found)}")
    what = what_it_is(head)
    is_page = what is not None and "HTML" in what
    if what and head and not compression and (kind != "text" if is_page else _IN_NO_TEXT.search(head)):
        raise UserError(f"{path} is no {kind}: it {described(path)}")


def _ending_of(compression: str) -> str:
    return next(ending for ending, kind in COMPRESSIONS.items() if kind == compression)


def _encoding_of(path: str, head: bytes, encoding: str) -> str:
    """What the byte-order mark says, else what was given. Raises UserError for UTF-16 without either."""
    marked = marked_encoding(head)
    if not marked and encoding == "utf-8" and is_bare_utf16(head):
        raise UserError(f"{path} {_UTF_16}")
    return marked or encoding


def _encoding_of_dump(path: str, encoding: str) -> str:
    """The encoding by mark, by the XML's own word, else as given. Raises UserError for what is no dump, whatever it
    begins with."""
    head, fault = dump_head(path)
    if not head:
        raise UserError(f"{path}: {fault}" if fault else f"{path} is empty")
    encoding = _encoding_of(path, head, declared_encoding(head) or encoding)
    if not is_dump(path, encoding):
        what = what_it_is(head)
        why = fault or (f"it is {what}" if what else "it does not begin with <mediawiki>")
        raise UserError(f"{path} is XML, but not a MediaWiki dump: {why}" if fault or not what else
                        f"{path} is not a MediaWiki dump: {why}")
    read_site(path, encoding)
    return encoding


def _first_bytes(path: str, compression: str) -> bytes:
    """The first bytes of what the file holds; none of a broken one, which reading will name. Raises UserError for one
    that asks for too much memory."""
    with open(path, "rb") as file, open_stream(file, compression, path) as stream:
        try:
            return stream.read(4096)
        except TooDemanding as error:
            raise UserError(f"{path}: {broken(error, compression)}") from None
        except BROKEN:
            return b""


def _begins_array(head: bytes, encoding: str) -> bool:
    """Whether text begins with "[" (cut bytes at the end of the head do not matter)."""
    return head.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n").startswith("[")
