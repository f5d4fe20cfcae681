"""What a file holds, by its first bytes: named where it is not what its name says.

The commonest damaged file is no damaged file: it is what stands for it until it is fetched (a pointer of Git LFS or
git-annex), or what came in its place (a web page that says why it did not).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.errors import UserError

HEAD_BYTES = 1024
"""Enough of a file for all that is asked here."""
_LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/v\d+\s.*?^size (\d{1,20})$", re.DOTALL | re.MULTILINE)
_ANNEX = re.compile(rb"[./]*(?:/annex/objects|\.git/annex/objects)/\S+\s*\Z")
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_MAGIC = (
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"Obj\x01", "an Avro file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"%PDF-", "a PDF"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"MMIDIDX\x00", "the index of a corpus"),
)


def first_bytes(path: str | Path) -> bytes:
    """The first HEAD_BYTES of a file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def refuse_pointer(path: str | Path) -> None:
    """Raises UserError where a file is no file but a pointer to one, which the tools of Git LFS or git-annex put in its
    place; OSError where it cannot be read."""
    refuse_pointer_text(str(path), first_bytes(path))


def refuse_pointer_text(path: str, head: bytes) -> None:
    """The same of what was read from a file, which may be a pipe."""
    if found := _LFS.match(head):
        raise UserError(f"{path} is a pointer of Git LFS, not the file of {int(found[1]):,} bytes that it stands for; "
                        "run `git lfs pull` in its repository, or download the file itself")
    if _ANNEX.match(head):
        raise UserError(f"{path} is a pointer of git-annex, not the file that it stands for; run `git annex get` in "
                        "its repository, or download the file itself")


def what_it_is(head: bytes) -> str | None:
    """What a file's first bytes say that it is, in words; None where they say nothing."""
    if _PAGE.match(head):
        return "a web page (HTML), maybe one that says why the file was not sent"
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "nothing but zeros at its beginning: it was never written whole"
    return next((words for magic, words in _MAGIC if head.startswith(magic)), None)


def described(path: str | Path) -> str:
    """`is a web page (HTML)`, or `begins with b'...'`, of a file that is not what it should be. Never raises."""
    try:
        head = first_bytes(path)
        size = os.path.getsize(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    words = what_it_is(head)
    return f"is {words} ({size:,} bytes)" if words else f"begins with {head[:12]!r} ({size:,} bytes)"
