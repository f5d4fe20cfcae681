"""The files of a Hugging Face folder, none of which may stand outside it."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.manifest import PLAIN
from engine.errors import UserError


def plain_file(folder: Path, name: str) -> Path:
    """folder / name where that is a file in the folder itself; a link out of it is refused, but for the hub cache's own
    (snapshots/REVISION/file -> blobs/..)."""
    if not PLAIN.fullmatch(name):
        raise UserError(f"{folder}: {name[:80]!r} is not a plain file name")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing")
    home = folder.resolve()
    allowed = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if path.resolve().parent not in allowed:
        raise UserError(f"{path} is a link out of its folder")
    return path
