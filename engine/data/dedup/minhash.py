"""MinHash signatures with locality-sensitive hashing, vectorised over batches of documents.

A document is the set of its shingles: runs of 5 words, of 8 characters where a script has no spaces, or of as much of
both (units.py), lower-cased and without punctuation. Two documents of Jaccard similarity s agree in one minimum with
probability s, in a band of r minima with s^r, and in at least one of b bands with 1 - (1 - s^r)^b: 14 bands of 8 rows
find 92 % of the pairs at s = 0.8 and 5 % at 0.5 (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4; the parameters are FineWeb's, arXiv:2406.17557).

All b x r hash functions are evaluated on every shingle: h_k = u a_k + v mod 2^32 over two independent halves u, v of
the shingle's 64-bit hash. In numpy that costs 25 ns a shingle for 112 functions, less than finding the words does, so
nothing is left for one-permutation schemes (arXiv:1703.04664) to win, which bend the curve for short documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from engine.data.units import constants, run_lengths, run_sums, scramble, units, weigh
from engine.errors import UserError

BANDS, ROWS = 14, 8
SHINGLE_WORDS = 5
MAX_BANDS, MAX_HASHES = 512, 4096  # each band is an open file

_BATCH = 1 << 15  # characters hashed at once, no more than units() takes in one piece
_LANES = 16  # hash functions evaluated at once,
_SHINGLES = 1 << 13  # on so many shingles: half a megabyte of products


class MinHash:
    """Near duplicates: one 64-bit hash of each band's minima."""

    name = "near"
    words = 1
    """64-bit words in a key: documents that agree in one band's key are duplicates."""

    def __init__(self, bands: int = BANDS, rows: int = ROWS, seed: int = 0) -> None:
        """seed: which hash functions. Raises UserError for numbers that make no sense."""
        if rows < 1 or not 1 <= bands <= MAX_BANDS or bands * rows > MAX_HASHES:
            raise UserError(
                f"{bands} bands of {rows} rows: 1 to {MAX_BANDS} bands, at least 1 row, and their product, the hash "
                f"functions, at most {MAX_HASHES:,}; {BANDS}x{ROWS} is usual"
            )
        self.bands, self.rows = bands, rows
        self._factors = (constants(bands * rows, 2 + seed) >> np.uint64(32)).astype(np.uint32)
        self._mixers = constants(rows, 0)

    def __repr__(self) -> str:
        return f"near, MinHash of {self.bands} bands x {self.rows} rows"

    def chance(self, similarity: float) -> float:
        """The probability that two documents of this Jaccard similarity become candidates, and so duplicates."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.bands

    def signature(self, text: str) -> bytes:
        """The signature of one document, 8 bytes a band, little endian."""
        return self.signatures([text]).astype("<u8").tobytes()

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """uint64 [documents, bands]; a row depends on its own text alone, so batches may be cut anywhere.

        A text of fewer units than a shingle is one shingle; one without any (empty, or nothing but punctuation) is
        compared as written, without the white space around it."""
        parts = [self._batch(batch) for batch in _batches(texts)]
        return np.concatenate(parts) if parts else np.empty((0, self.bands), np.uint64)

    def _batch(self, texts: list[str]) -> np.ndarray:
        shingles, counts = _shingles(texts)
        minima = self._minima(shingles, np.cumsum(counts) - counts)
        banded = minima.reshape(self.bands, self.rows, len(texts)).astype(np.uint64)
        mixed = (banded * self._mixers[:, None]).sum(axis=1, dtype=np.uint64)  # [bands, documents]
        return scramble(np.ascontiguousarray(mixed.T))

    def _minima(self, shingles: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The least value of each hash function on each document's shingles, uint32 [functions, documents].

        starts: each document's first shingle, strictly increasing from 0."""
        high, low = (shingles >> np.uint64(32)).astype(np.uint32), shingles.astype(np.uint32)
        least = np.full((len(self._factors), len(starts)), 0xFFFFFFFF, np.uint32)
        products = np.empty((_LANES, _SHINGLES), np.uint32)
        for at in range(0, len(shingles), _SHINGLES):
            end = min(at + _SHINGLES, len(shingles))
            first = int(np.searchsorted(starts, at, side="right")) - 1
            last = int(np.searchsorted(starts, end))
            begins = np.maximum(starts[first:last] - at, 0)
            for lane in range(0, len(least), _LANES):
                factors = self._factors[lane : lane + _LANES, None]
                out = products[: len(factors), : end - at]
                np.multiply(factors, high[at:end], out=out)
                out += low[at:end]
                here = least[lane : lane + _LANES, first:last]
                np.minimum(here, np.minimum.reduceat(out, begins, axis=1), out=here)
        return least


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Lower-cased texts, as many at a time as fill the arrays that are worked on; a longer one comes alone, so that
    where units() cuts it does not depend on its neighbours."""
    held: list[str] = []
    size = 0
    for text in texts:
        lower = text.lower()
        if held and size + len(lower) > _BATCH:
            yield held
            held, size = [], 0
        held.append(lower)
        size += len(lower) + 1
    if held:
        yield held


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all texts' shingles, one text after the other, and how many each has (at least one)."""
    found = units("\n".join(texts))
    last = np.searchsorted(found.starts, np.cumsum([len(text) + 1 for text in texts]))  # the unit after each document's
    first = np.concatenate([[0], last[:-1]])
    counts = last - first
    lengths = run_lengths(weigh(found.spaceless), SHINGLE_WORDS)
    runs = run_sums(found.hashes, lengths)
    sums = np.zeros(len(found.starts), np.uint64)
    sums[: len(runs)] = runs
    taken = np.zeros(len(sums), bool)  # where a run begins that ends within its document
    taken[: len(runs)] = np.arange(len(runs)) + lengths <= np.repeat(last, counts)[: len(runs)]
    sizes = np.diff(np.concatenate([[0], np.cumsum(taken)])[np.concatenate([[0], last])])
    for number in np.flatnonzero((counts > 0) & (sizes == 0)):
        whole = found.hashes[first[number] : last[number]]
        sums[first[number]] = run_sums(whole, len(whole))[0]
        taken[first[number]] = True
    sizes = np.maximum(sizes, 1)
    bare = np.flatnonzero(counts == 0)
    where = (np.cumsum(sizes) - sizes)[bare] - np.arange(len(bare))
    return np.insert(scramble(sums[taken]), where, [_as_written(texts[n]) for n in bare]), sizes


def _as_written(text: str) -> int:
    raw = text.strip().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
