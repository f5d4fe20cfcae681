"""manifest.json: for every logical tensor its shape, dtype and slices; for every file its size; read with suspicion."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import __version__
from engine.checkpoint.dtypes import DTYPES
from engine.checkpoint.folders import MANIFEST
from engine.checkpoint.slices import KINDS
from engine.checkpoint.stored_config import of_newer, stored_config
from engine.checkpoint.strict_json import read_object
from engine.errors import UserError, shown
from engine.model.shapes import logical_shapes

FORMAT = "triax"
VERSION = 1
LIMIT = 1 << 30
"""Bytes of the longest manifest; one slice takes about 150."""
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""A file name that stays in its folder."""
NAME_BYTES = 255
"""The longest file name that file systems take."""
BEYOND = 1 << 63
"""No size, step or checksum reaches this."""
DIMS = 8
"""The most dims of a tensor of ours."""
OWN_KEYS = ("format", "version", "triax", "step", "files", "assets", "tensors", "crc32")
"""Keys of the manifest that the caller's meta cannot have."""


@dataclass(frozen=True)
class Slice:
    """A rectangle of a logical tensor in a file, and the crc32 of its bytes."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class LogicalTensor:
    """A logical tensor: its whole shape, our word for its dtype, the slices that cover it."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. `meta` holds the caller's keys (samples, config, world, ..); `files` sizes of the
    tensor files; `assets` size and crc32 of each file under hf/; `writer` the version of Triax that wrote it ("" where
    it is not told)."""

    step: int
    meta: Mapping[str, Any]
    files: Mapping[str, int]
    assets: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, LogicalTensor]
    writer: str = ""


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    body: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "triax": __version__, "step": manifest.step, **manifest.meta,
        "files": dict(manifest.files),
        "assets": {name: {"bytes": size, "crc32": crc} for name, (size, crc) in manifest.assets.items()},
        "tensors": {name: asdict(tensor) for name, tensor in manifest.tensors.items()},
    }
    body = json.loads(json.dumps(body, allow_nan=False))
    return json.dumps({**body, "crc32": _checksum(body)}, separators=(",", ":")).encode()


def _checksum(body: Mapping[str, Any]) -> int:
    """crc32 of the manifest without its own checksum, in one canonical spelling."""
    return zlib.crc32(json.dumps(body, separators=(",", ":"), sort_keys=True).encode())


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks a step folder's manifest; UserError for anything that is not as this module writes it."""
    path = folder / MANIFEST
    content = read_object(path, LIMIT)
    if content.get("format") != FORMAT:
        raise UserError(f"{shown(path)} is not a Triax checkpoint: format '{shown(content.get('format'))}'")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise UserError(f"{shown(path)} has the format version '{shown(version)}'; this Triax reads {VERSION}")
    if version > VERSION:
        raise UserError(f"{shown(path)} was written by a newer Triax: format version {shown(version)}, and this one "
                        f"reads {VERSION}; update Triax")
    if content.pop("crc32", None) != _checksum(content):
        raise UserError(f"{path} does not match its checksum: it is damaged or was edited; take another step")
    writer = content.get("triax", "")
    if not isinstance(writer, str):
        raise UserError(f"{shown(path)}: triax is not a version")
    try:
        _refuse_crowd(path, content, writer)
        return _manifest(_Reader(path), content, writer)
    except UserError as error:
        raise of_newer(error, path, writer) from None


def _refuse_crowd(path: Path, content: Mapping[str, Any], writer: str) -> None:
    """UserError where the manifest names more tensors than its model can have, before each of them is looked at."""
    tensors, config = content.get("tensors"), content.get("config")
    if not isinstance(tensors, dict) or not isinstance(config, dict):
        return  # complained of where they are read
    try:
        most = len(KINDS) * len(logical_shapes(stored_config(config, path.parent, writer).model))
    except UserError:
        return
    if len(tensors) > most:
        raise UserError(f"{shown(path)} names {len(tensors):,} tensors, and its model has at most {most:,}")


def _manifest(reader: _Reader, content: Mapping[str, Any], writer: str) -> Manifest:
    """The manifest of a table whose checksum is right."""
    files = reader.table(content, "files")
    return Manifest(
        step=reader.whole(content.get("step"), "step"),
        meta={key: value for key, value in content.items() if key not in OWN_KEYS},
        files={reader.plain(name): reader.whole(size, name) for name, size in files.items()},
        assets={reader.plain(name): (reader.whole(entry.get("bytes"), name), reader.whole(entry.get("crc32"), name))
                for name, entry in reader.tables(content, "assets").items()},
        tensors={reader.kind(name): reader.tensor(name, entry, files)
                 for name, entry in reader.tables(content, "tensors").items()},
        writer=writer)


class _Reader:
    """Turns JSON values into typed ones, and complains by the manifest's path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, what: str) -> UserError:
        return UserError(f"{shown(self.path)}: {what}")

    def whole(self, value: Any, what: str) -> int:
        if type(value) is not int or not 0 <= value < BEYOND:
            raise self.fail(f"{shown(what)} is '{shown(value, 40)}', not a whole number below 2^63")
        return value

    def table(self, content: Mapping[str, Any], key: str) -> dict[str, Any]:
        if not isinstance(content.get(key), dict):
            raise self.fail(f"{key} is missing or not a table")
        return dict(content[key])

    def tables(self, content: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
        found = self.table(content, key)
        for name, entry in found.items():
            if not isinstance(entry, dict):
                raise self.fail(f"{key}: '{shown(name)}' is not a table")
        return found

    def plain(self, name: Any) -> str:
        if not isinstance(name, str) or not PLAIN.fullmatch(name) or len(name) > NAME_BYTES:
            raise self.fail(f"'{shown(name)}' is not a plain file name")
        return name

    def kind(self, name: str) -> str:
        kind, _, rest = name.partition("/")
        if kind not in KINDS or not rest:
            raise self.fail(f"the tensor '{shown(name)}' is of no kind known here ({', '.join(KINDS)})")
        return name

    def sizes(self, values: Any, what: str) -> tuple[int, ...]:
        if not isinstance(values, list) or len(values) > DIMS:
            raise self.fail(f"{shown(what)} is not a list of at most {DIMS} sizes")
        if all(type(value) is int and 0 <= value < BEYOND for value in values):
            return tuple(values)
        return tuple(self.whole(value, what) for value in values)

    def tensor(self, name: str, entry: Mapping[str, Any], files: Mapping[str, Any]) -> LogicalTensor:
        slices = entry.get("slices")
        if not isinstance(slices, list) or not all(isinstance(item, dict) for item in slices):
            raise self.fail(f"{shown(name)} has no list of slices")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.fail(f"{shown(name)} has the unknown dtype '{shown(dtype)}'")
        found = []
        for item in slices:
            file, key = item.get("file"), item.get("key")
            if not isinstance(file, str) or file not in files or not isinstance(key, str):
                raise self.fail(f"{shown(name)} has a slice in '{shown(file)}', which is not one of the files")
            found.append(Slice(file, key, self.sizes(item.get("offset"), f"{name}: offset"),
                               self.sizes(item.get("shape"), f"{name}: shape"), self.whole(item.get("crc32"), name)))
        return LogicalTensor(self.sizes(entry.get("shape"), f"{name}: shape"), dtype, tuple(found))
