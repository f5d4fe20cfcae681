"""Parquet, through the optional package pyarrow: a column of text, row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from engine.data.inputs.items import MAX_RECORD_BYTES, BadRecord, Document, Fault, check_whole
from engine.errors import UserError, nearest, shown
from engine.signature import described

MARKS = (b"PAR1", b"PARE")
"""What a file begins and ends with: plain, and with an encrypted footer."""
_ROWS = 256  # rows decoded at a time
_TEXT = ("string", "large_string", "string_view")


def check_parquet(path: str) -> None:
    """Raises UserError for a file that does not begin and end as Parquet does, OSError for one that cannot be read."""
    with open(path, "rb") as file:
        if not file.read(4).startswith(MARKS):
            raise UserError(f"{path} is no Parquet file: it {described(path)}")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        if not file.read(4).startswith(MARKS):
            raise UserError(f"{path} is cut short: it begins as a Parquet file, and its {size:,} bytes do not end as "
                            "one")


def read_rows(path: str, start: int, stop: int, column: str) -> Iterator[Document | Fault]:
    """The rows of the row groups whose data begins in bytes [start, stop); a document's "line" is its row in the file,
    from 1. Null is an empty document. Raises UserError when pyarrow is missing, OSError for a file it cannot read."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path} needs the package "pyarrow": pip install pyarrow') from None
    row = 1
    try:
        with ParquetFile(path) as file:
            fault = _column_fault(file, column)
            metadata = file.metadata
        if fault is not None:
            if start == 0:
                yield Fault(1, fault)
            return
        # A dictionary keeps one copy of a text that many rows share, however long it is.
        with ParquetFile(path, metadata=metadata, read_dictionary=[column]) as file:
            last = os.path.getsize(path) - 1
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if start <= min(_offset(about), last) < stop:  # one that cannot be there is the last span's to name
                    yield from _rows(file, group, column, row)
                row += about.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _of_content(error) from None


def read_table(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, columns) of every row of a file. Raises UserError when pyarrow is missing, for two columns of one
    name and for text that is not UTF-8, OSError for a file it cannot read."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path} needs the package "pyarrow": pip install pyarrow') from None
    row = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f'{path}: two columns are named "{shown(twice)}"')
            for batch in file.iter_batches(batch_size=_ROWS):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {row + 1} or later: the text is not UTF-8: {error.reason}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise _of_content(error) from None


def _of_content(error: Exception) -> OSError:
    """An error of the disk as it is; pyarrow's own about the content, which have no number, as an OSError in words."""
    if isinstance(error, OSError) and error.errno:
        return error
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return OSError(f"the Parquet file is damaged, or of a kind that pyarrow does not know (pyarrow: {words})")


def _offset(group: Any) -> int:
    """The byte at which a row group begins."""
    chunk = group.column(0)
    offsets = [chunk.data_page_offset, chunk.dictionary_page_offset]
    return max(0, min(offset for offset in offsets if offset is not None))


def _column_fault(file: Any, column: str) -> str | None:
    import pyarrow

    schema = file.schema_arrow
    count = schema.names.count(column)
    if count > 1:
        return f'{count} columns are named "{column}"'
    if not count:
        hint = nearest(column, schema.names)
        names = ", ".join(map(shown, schema.names[:8])) or "none"
        return f'no column "{column}"; the file has {names} (choose with --json-key)' + (
            f"; did you mean {shown(hint)}?" if hint else ""
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in _TEXT:
        return f'column "{column}" is {shown(str(kind))}, not text'
    return None


def _rows(file: Any, group: int, column: str, row: int) -> Iterator[Document | Fault]:
    for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column]):
        for value in batch.column(0):
            try:
                yield from _row(value, row)
            except UnicodeDecodeError as error:
                yield Fault(row, f"the text is not UTF-8: {error.reason} at byte {error.start}")
            except BadRecord as error:
                yield Fault(row, str(error))
            row += 1


def _row(value: Any, row: int) -> Iterator[Document | Fault]:
    text = value.as_py() or ""
    if len(text) > MAX_RECORD_BYTES:
        raise BadRecord(f"the document is longer than {MAX_RECORD_BYTES:,} characters")
    yield Document(row, check_whole(text))
