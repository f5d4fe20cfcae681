"""Reader and writer of Megatron-LM's indexed dataset: P.bin holds the tokens, P.idx says where each sequence lies.

The layout, byte for byte, is that of Megatron-LM's `megatron/core/datasets/indexed_dataset.py` (MMIDIDX, version 1):
    .idx = magic 9 B, version u64, dtype code u8, sequences S u64, document index length D u64,
           i32[S] tokens in each sequence, i64[S] byte offsets in .bin, i64[D] document index (multimodal: and i8[S]).
    .bin = the tokens of all sequences one after another.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from engine.data.checksum import Summing
from engine.data.claim import claim, remove, sync, sync_folder
from engine.data.facts import write_facts
from engine.data.files import Entries, ReadFile, Tokens, Watched
from engine.errors import UserError
from engine.signature import refuse_pointer

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_BLOCK = 1 << 20  # entries handled at a time, so that memory does not grow with the corpus


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM stores a vocabulary of this size in: u16 below 65,500 entries, else i32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix. (`Path.with_suffix` would eat what follows a dot in the prefix's own name.)"""
    return Path(f"{prefix}{suffix}")


def one_corpus_twice(prefixes: Sequence[str]) -> tuple[str, str] | None:
    """Two of the prefixes that lead to one .bin: other spellings of a path, or links. None where there are none."""
    seen: dict[tuple[int, int], int] = {}
    for number, prefix in enumerate(prefixes):
        with contextlib.suppress(OSError, ValueError):  # one that is not there is named by who opens it
            stat = os.stat(with_suffix(prefix, ".bin"))
            first = seen.setdefault((stat.st_dev, stat.st_ino), number)
            if first != number:
                return prefixes[first], prefix
    return None


def bare_prefix(name: str) -> str:
    """The prefix of a corpus that is named by one of its files: P of P.bin and P.idx. A prefix that itself ends so
    (P.bin of P.bin.idx) stays."""
    for suffix in (".bin", ".idx"):
        if name.endswith(suffix) and not os.path.exists(f"{name}.idx") and os.path.exists(
                f"{name.removesuffix(suffix)}.idx"):
            return name.removesuffix(suffix)
    return name


def output_prefix(name: str) -> str:
    """The prefix that a corpus is to be written under: P, where it is called P.bin or P.idx, as in `bare_prefix`."""
    folder, file = os.path.split(name)
    for suffix in (".bin", ".idx"):
        if file.endswith(suffix) and file != suffix and not os.path.exists(f"{name}.idx"):
            return os.path.join(folder, file.removesuffix(suffix))
    return name


class IndexedDataset:
    """A corpus on disk, memory-mapped. Opening reads the header and a few entries, whatever the corpus' size.

    tokens: the flat stream of all tokens [total]; sizes: tokens in each sequence [S]; pointers: byte offsets [S];
    document_index: for each document its first sequence, and at the end S [documents + 1].
    """

    def __init__(self, prefix: str | Path) -> None:
        """Raises UserError, naming file and numbers, when the pair is missing or contradicts itself."""
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (self.idx_path, self.bin_path):
            if not os.path.isfile(path):
                raise UserError(f"{path} does not exist; a corpus is given as its prefix, without .bin or .idx")
        try:
            for path in (self.idx_path, self.bin_path):
                refuse_pointer(path)
            self._watched = [Watched(path) for path in (self.idx_path, self.bin_path)]
            self.dtype, sequences, documents = self._read_header()
            self._map_index(sequences, documents)
            self._check_ends()
            self.tokens = _map(self.bin_path, self.dtype)  # [total]
            self._pieces = Tokens(ReadFile(self.bin_path), self.dtype)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}") from None

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        """The token dtype, the number of sequences and the length of the document index, checked against the size."""
        with open(self.idx_path, "rb") as file:
            raw = file.read(_HEADER.size)
        size = self.idx_path.stat().st_size
        if len(raw) < _HEADER.size:
            raise UserError(f"{self.idx_path} has {size} bytes; an index has at least {_HEADER.size}")
        magic, version, code, sequences, documents = _HEADER.unpack(raw)
        if magic != MAGIC:
            raise UserError(f"{self.idx_path} starts with {magic!r}, not {MAGIC!r}: it is no Megatron-LM index")
        if version != VERSION:
            raise UserError(f"{self.idx_path} has version {version}; only version {VERSION} can be read")
        if code not in _DTYPES or _DTYPES[code][1] == "f":
            raise UserError(f"{self.idx_path} has dtype code {code}; tokens have 1, 2, 3, 4, 5 or 8 (whole numbers)")
        expected = _HEADER.size + sequences * 12 + documents * 8
        if size not in (expected, expected + sequences):
            raise UserError(
                f"{self.idx_path} has {size} bytes, but its {sequences} sequences and document index of {documents} "
                f"entries need {expected}; {'it is cut short or ' if size < expected else ''}its counts are wrong"
            )
        if documents < 1:
            raise UserError(f"{self.idx_path} has an empty document index; it must hold at least one entry, 0")
        return np.dtype(_DTYPES[code]), sequences, documents

    def _map_index(self, sequences: int, documents: int) -> None:
        raw = _map(self.idx_path, np.dtype("u1"))
        at = _HEADER.size
        self.sizes: np.ndarray = np.frombuffer(raw, "<i4", sequences, at)
        self.pointers: np.ndarray = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        self.document_index: np.ndarray = np.frombuffer(raw, "<i8", documents, at + 12 * sequences)
        file = ReadFile(self.idx_path)
        self._pointers = Entries(file, "the byte offset of sequence", at + 4 * sequences, sequences)
        self._firsts = Entries(file, "the first sequence of document", at + 12 * sequences, documents - 1)

    def _check_ends(self) -> None:
        """The entries every reader relies on: where the stream starts and where the last sequence ends."""
        sequences, item = len(self.sizes), self.dtype.itemsize
        first, last = int(self.document_index[0]), int(self.document_index[-1])
        if first != 0 or last != sequences:
            raise UserError(
                f"{self.idx_path}: the document index runs from {first} to {last}, not from 0 to {sequences}, "
                "the number of sequences"
            )
        start = int(self.pointers[0]) if sequences else 0
        end = int(self.pointers[-1]) + int(self.sizes[-1]) * item if sequences else 0
        actual = self.bin_path.stat().st_size
        if start != 0 or end != actual or actual % item or (sequences and int(self.sizes[-1]) < 0):
            raise UserError(
                f"{self.idx_path} describes bytes {start} to {end} of {self.bin_path}, which has {actual} bytes; "
                + ("it is cut short, or the two files do not belong together" if actual < end else
                   "the two files do not belong together, or one is damaged")
            )

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.document_index) - 1

    def token_start(self, document: int) -> int:
        """Where document `document` starts in `tokens`; `documents` itself gives the end of the stream.

        Raises UserError when the index' entry is out of range."""
        sequence = int(self.document_index[document])
        if not 0 <= sequence <= len(self.sizes):
            raise UserError(
                f"{self.idx_path}: document {document} starts at sequence {sequence} of {len(self.sizes)}"
            )
        if sequence == len(self.sizes):
            return len(self.tokens)
        start, rest = divmod(int(self.pointers[sequence]), self.dtype.itemsize)
        if rest or not 0 <= start <= len(self.tokens):
            raise UserError(
                f"{self.idx_path}: sequence {sequence} points at byte {int(self.pointers[sequence])} of "
                f"{self.bin_path}, which has {len(self.tokens) * self.dtype.itemsize} bytes"
            )
        return start

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens [start, start + length) of each piece [n], one piece after another [sum of lengths], from the file
        itself. Raises UserError where it cannot be read."""
        return self._pieces.read(starts, lengths)

    def begins(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which tokens of the pieces begin a document, as `read` puts them: bool [sum of lengths]. An empty document
        begins where the next one does. Raises UserError where the index contradicts itself."""
        out = np.zeros(int(lengths.sum()), bool)
        at = 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            out[at - start + self._document_starts(start, start + length)] = True
            at += length
        return out

    def _document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where in the stream those documents begin that begin in [start, stop)."""
        item = self.dtype.itemsize
        first = self._pointers.lower_bound(start * item)
        pointers = self._pointers.run(first, stop * item)  # of the sequences that begin there
        document = first  # so it is where each document is one sequence; two entries show whether it is
        around = self._firsts.read(max(document - 1, 0), document + 1).tolist()
        if len(around) < 1 + (document > 0) or around[-1] < first or (document and around[0] >= first):
            document = self._firsts.lower_bound(first)
        sequences = self._firsts.run(document, first + len(pointers))  # they ascend, as the pointers do
        if len(sequences) and (sequences[0] < first or pointers[0] < start * item):
            raise UserError(f"{self.idx_path}: document {document} starts at sequence {sequences[0]}, which starts at "
                            f"byte {pointers[0]}; it was looked for at byte {start * item}: the index is damaged")
        return pointers[sequences - first] // item

    def check_unchanged(self) -> None:
        """Raises UserError, saying what has changed, when either file is not what it was when it was opened."""
        for watched in self._watched:
            watched.check()

    def document(self, document: int) -> np.ndarray:
        """The tokens of one document, a view of the file [length]. Raises UserError when the index is broken there."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        start, stop = self.token_start(document), self.token_start(document + 1)
        if stop < start:
            raise UserError(f"{self.idx_path}: document {document} ends at token {stop}, before its start {start}")
        return self.tokens[start:stop]

    def verify(self, vocab_size: int | None = None) -> None:
        """Reads everything, in constant memory. Raises UserError at the first entry or token id out of range."""
        self.verify_index()
        for at in range(0, len(self.tokens), _BLOCK):
            check_ids(self.tokens[at : at + _BLOCK], vocab_size, f"{self.bin_path}, from token {at}")

    def verify_index(self) -> None:
        """Reads the index, in constant memory. Raises UserError at the first entry out of range."""
        expected = 0
        for at in range(0, len(self.sizes), _BLOCK):
            sizes = self.sizes[at : at + _BLOCK].astype(np.int64)
            ends = expected + np.cumsum(sizes) * self.dtype.itemsize
            starts = ends - sizes * self.dtype.itemsize
            bad = np.flatnonzero((sizes < 0) | (self.pointers[at : at + _BLOCK] != starts))
            if bad.size:
                n = at + int(bad[0])
                raise UserError(
                    f"{self.idx_path}: sequence {n} has {int(self.sizes[n])} tokens at byte {int(self.pointers[n])}, "
                    f"but byte {int(starts[bad[0]])} is where the one before it ends"
                )
            expected = int(ends[-1])
        for at in range(0, self.documents, _BLOCK):
            if np.any(np.diff(self.document_index[at : at + _BLOCK + 1]) < 0):
                raise UserError(f"{self.idx_path}: the document index goes backwards after document {at}")


def check_ids(ids: np.ndarray, vocab_size: int | None, where: str) -> None:
    """Raises UserError when an id is negative or not below vocab_size (None: any)."""
    if ids.size == 0:
        return
    low, high = 0 if ids.dtype.kind == "u" else int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wrong = low if low < 0 else high
        vocabulary = "any vocabulary" if vocab_size is None else f"the vocabulary of {vocab_size} entries"
        raise UserError(f"{where}: token id {wrong} is outside {vocabulary}")


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    # A plain ndarray view: slices of np.memmap cost several times more to make.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx so that they appear whole or not at all.

    Everything is streamed to PREFIX.partial/ and renamed at the end; a lock there keeps two runs apart, and what a
    killed run left there is cleared by the next. Use as a context manager: leaving it without `finish` throws all away.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None, *, dtype: np.dtype[Any] | None = None) -> None:
        """dtype: of the ids; None: what Megatron-LM stores such a vocabulary in. vocab_size None, which needs a dtype:
        no id is too large. Raises UserError when the folder cannot be written or another run writes the same prefix."""
        self.prefix, self.vocab_size = str(prefix), vocab_size
        self.dtype = np.dtype(dtype) if dtype is not None else token_dtype(vocab_size or 0)
        self.sequences = self.documents = self.tokens = 0
        self.folder = with_suffix(prefix, ".partial")
        self._lock = claim(self.folder)
        self._bin = open(self.folder / "bin", "wb")
        self._sizes = open(self.folder / "sizes", "wb")
        self._ends = open(self.folder / "ends", "wb")
        self._sums = {"bin": Summing(), "idx": Summing()}

    def add_documents(
        self, ids: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray | None = None
    ) -> None:
        """Appends documents: their tokens one after another [total], the length of each sequence [n], and, where a
        document has several sequences, how many each has. Raises UserError for an id outside the vocabulary."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if int(lengths.sum()) != len(ids):
            raise ValueError(f"lengths sum to {int(lengths.sum())} for {len(ids)} tokens")
        check_ids(ids, self.vocab_size, self.prefix)
        if lengths.size and int(lengths.max()) >= 1 << 31:
            raise UserError(f"a document of {int(lengths.max())} tokens; the format holds at most {(1 << 31) - 1}")
        per_document = np.ones(len(lengths), np.int64) if sequences_per_document is None else sequences_per_document
        tokens = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._bin.write(tokens)
        self._sums["bin"].update(tokens)
        self._sizes.write(lengths.astype("<i4").data)
        self._ends.write((self.sequences + np.cumsum(per_document)).astype("<i8").data)
        self.sequences += len(lengths)
        self.documents += len(per_document)
        self.tokens += len(ids)

    def add_document(self, ids: np.ndarray) -> None:
        """Appends one document [length]."""
        self.add_documents(ids, np.array([len(ids)]))

    def finish(self, info: Mapping[str, Any] | None = None) -> None:
        """Puts PREFIX.bin, PREFIX.idx and, when info is given, PREFIX.json in place, in that order. To what info tells
        the checksums of both files are added, as they were taken while the files were written."""
        for file in (self._bin, self._sizes, self._ends):
            sync(file)
            file.close()
        with open(self.folder / "idx", "wb") as idx:
            self._write_index(idx)
            sync(idx)
        if info is not None:
            # A file's name that is not UTF-8 becomes the escape that JSON has for it.
            with open(self.folder / "json", "w", encoding="utf-8", errors="backslashreplace") as text:
                write_facts(text, info, {name: summing.sums() for name, summing in self._sums.items()})
                sync(text)
        # An index beside another corpus' tokens would be worse than none: the old one goes before anything comes.
        for suffix in (".json", ".idx"):
            with_suffix(self.prefix, suffix).unlink(missing_ok=True)
        for suffix in (".bin", ".idx") + ((".json",) if info is not None else ()):
            os.replace(self.folder / suffix[1:], with_suffix(self.prefix, suffix))
        sync_folder(self.folder.parent)
        self.abort()

    def _write_index(self, idx: IO[bytes]) -> None:
        for part in self._index_parts():
            idx.write(part)
            self._sums["idx"].update(part)

    def _index_parts(self) -> Iterator[bytes | memoryview]:
        """The index' bytes, from its first to its last."""
        yield _HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self.sequences, self.documents + 1)
        with open(self.folder / "sizes", "rb") as sizes:
            yield from iter(partial(sizes.read, _BLOCK), b"")
        offset = 0
        sizes_on_disk = _map(self.folder / "sizes", np.dtype("<i4"))
        for at in range(0, self.sequences, _BLOCK):
            nbytes = sizes_on_disk[at : at + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(nbytes)
            yield (ends - nbytes).astype("<i8").data
            offset = int(ends[-1])
        yield struct.pack("<q", 0)
        with open(self.folder / "ends", "rb") as ends_file:
            yield from iter(partial(ends_file.read, _BLOCK), b"")

    def abort(self) -> None:
        """Removes everything not yet in place."""
        for file in (self._bin, self._sizes, self._ends):
            with contextlib.suppress(OSError):  # of a full disk, which has been told of already
                file.close()
        if not self._lock.closed:
            with contextlib.suppress(OSError):
                remove(self.folder)
            self._lock.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()
