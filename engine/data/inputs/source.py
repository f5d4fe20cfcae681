"""Input files: found by name, folder or pattern; what each holds, by its name's ending and its first bytes."""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from stat import S_ISREG

from engine.data.inputs.items import shown
from engine.data.unpack import COMPRESSIONS, open_stream
from engine.data.wiki import is_dump, read_site
from engine.errors import UserError, nearest

UNFINISHED = (".work", ".partial")
"""Endings of the folders that runs of the preparation leave beside their output while they last."""
SPLITS = ("document", "line", "blank")
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text", ".text": "text", ".md": "text",
    ".parquet": "parquet", ".xml": "dump",
}  # fmt: skip
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # a message with such a name would not be one line
_UTF16 = re.compile(rb"(?:[^\0]\0){4}|(?:\0[^\0]){4}", re.DOTALL)  # four letters of which any is below U+0100
# In these a byte 0x0A is a line's end and nothing else, so bytes can be cut into lines before they are decoded.
_LINES_ARE_BYTES = re.compile(
    r"utf-8|ascii|cp(125|43|7\d|8[56]|93|94|95)\d?|(iso8859|koi8|gb|big5|euc|shift_jis|mac).*"
)


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
        return _LINES_ARE_BYTES.fullmatch(self.encoding) is not None

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
    for given in inputs:
        for path in _expand(given):
            source = _source(path, codec)
            stat = os.stat(path)
            first = seen.setdefault((stat.st_dev, stat.st_ino), source)
            if first is not source:
                also = f" and {first.path} are one file" if first.path != path else " is given twice"
                raise UserError(f"{path}{also}; its documents would be there twice")
            sources.append(source)
    return sources


def _codec(name: str) -> str:
    try:
        # Python's codecs that are no encodings of text refuse the first (base64, rot13) or the second (idna).
        "".encode(name)
        bytes(32).decode(name, "ignore")
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        hint = nearest(name, ("utf-8", "utf-16", "latin-1", "cp1252", "gb18030", "gbk", "big5", "shift_jis", "koi8-r"))
        raise UserError(f"unknown --encoding {shown(name)}" + (f"; did you mean {hint}?" if hint else "")) from None


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
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if kind is None:
        hint = nearest(ending, KINDS)
        advice = f"; did you mean {hint}?" if hint else ""
        raise UserError(f"{path} ends in {ending or 'nothing'}; known are {_endings()}{advice}")
    if compression and kind == "parquet":
        raise UserError(f"{path}: parquet is compressed inside and read at random; unpack the file first")
    head = b""
    if kind == "dump":
        if not is_dump(path):
            raise UserError(f"{path} is XML, but not a MediaWiki dump: it does not begin with <mediawiki>")
        read_site(path)  # which refuses one that is no dump, whatever it begins with
    elif kind != "parquet":
        head = _first_bytes(path, compression)
    marked = next((codec for mark, codec in _MARKS if head.startswith(mark)), None)
    if not marked and encoding == "utf-8" and _UTF16.match(head):
        raise UserError(f"{path} looks like UTF-16 without a byte-order mark; say --encoding utf-16-le (or -be)")
    if kind == "json" and not _begins_array(head, marked or encoding):
        kind = "jsonl"
    return Source(path, kind, compression, marked or encoding, stat.st_size, stat.st_mtime_ns)


def _first_bytes(path: str, compression: str) -> bytes:
    """The first bytes of what the file holds; none of a broken one, which reading will name."""
    with open(path, "rb") as file, open_stream(file, compression, path) as stream:
        try:
            return stream.read(4096)
        except (OSError, EOFError, ValueError):
            return b""


def _begins_array(head: bytes, encoding: str) -> bool:
    """Whether text begins with "[" (cut bytes at the end of the head do not matter)."""
    return head.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n").startswith("[")
