"""The documents of files, one after another: what training a vocabulary reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.data.inputs import SPLITS, Fault, LeftOut, ReadOptions, Source, find_sources, read_span
from engine.data.inputs.meter import BLOCK_BYTES
from engine.data.inputs.read import open_meter
from engine.errors import UserError

__all__ = ["SPLITS", "Source", "find_sources", "read_documents"]


def read_documents(
    paths: Sequence[str], json_key: str = "text", split_text: str = "document", byte_limit: int | None = None,
    encoding: str = "utf-8",
) -> Iterator[str]:
    """The documents of files in order; with byte_limit about that many bytes, an equal share of each file.

    paths: files, folders and patterns. Raises UserError at the first fault, naming file and line."""
    options = ReadOptions(json_key=json_key, split_text=split_text)
    sources = find_sources(paths, encoding)
    for source in sources:
        left = byte_limit // len(sources) if byte_limit else None
        with open_meter(source, 0, source.size, options, BLOCK_BYTES) as meter:
            for item in read_span(source, meter, options):
                if isinstance(item, LeftOut):
                    continue
                if isinstance(item, Fault):
                    raise UserError(f"{source.path}:{item.line}: {item.message}")
                if item.text.strip():
                    yield item.text
                if left is not None:
                    left -= len(item.text.encode("utf-8"))
                    if left <= 0:
                        break
