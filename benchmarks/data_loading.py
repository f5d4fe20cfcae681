"""Opening a corpus, and reading samples of it: time, memory and samples a second beside Megatron-LM's method.

Its method, as its GPTDataset has it, written here plainly with numpy: at the start three arrays are built, the shuffled
documents of an epoch, where in them each sample begins, and a shuffled order of the samples; a sample is put together
from pieces of a memory-mapped file. (Megatron-LM keeps the arrays on disk for the next start with the same settings,
and walks the documents in C++; a cumulative sum finds the same places.)

Opening: processes of their own, from the import of numpy to the first 64 sequences of 2,048 tokens, whose documents are
told apart; 100 million documents of 500 tokens, the .bin sparse. Samples: CPU seconds, tokens and labels as int64 ready
for the device, files in memory. Cold: wall seconds of 512 samples whose files the system was asked to forget.

    python benchmarks/data_loading.py [--documents 100000000] [--rounds 5] [--folder DIR] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, keep, table

from engine.data import open_samples
from engine.data.batches import PretrainBatches
from engine.data.indexed import IndexedDataset, IndexedWriter

SEQ, LENGTH, FIRST, COLD = 2048, 500, 64, 512
READ = 4096  # samples in one turn
OURS, OURS_DOCUMENTS, THEIRS = "triax", "triax, documents told apart", "Megatron-LM's method"
SIDES = (OURS, OURS_DOCUMENTS, THEIRS)


class UpFront:
    """Megatron-LM's method: all index arrays of an epoch before the first sample."""

    def __init__(self, prefix: str, seed: int = 0) -> None:
        self.corpus = IndexedDataset(prefix)
        rng = np.random.RandomState(seed)
        documents = np.arange(self.corpus.documents, dtype=np.int32)
        rng.shuffle(documents)
        ends = np.cumsum(self.corpus.sizes[documents], dtype=np.int64)
        count = (int(ends[-1]) - 1) // SEQ
        at = np.arange(count + 1, dtype=np.int64) * SEQ
        where = np.searchsorted(ends, at, side="right")
        offset = at - np.where(where, ends[where - 1], 0)
        self.documents = documents
        self.samples = np.stack([where, offset], axis=1).astype(np.int32)
        self.order = np.arange(count, dtype=np.uint32)
        rng.shuffle(self.order)

    def sample(self, k: int) -> np.ndarray:
        """Sample k, int64 [SEQ + 1], from the pieces of its documents."""
        row = self.order[k % len(self.order)]
        (first, start), (last, end) = self.samples[row], self.samples[row + 1]
        if first == last:
            return self._piece(first, start, end + 1).astype(np.int64)
        pieces = [self._piece(first, start, None)]
        pieces += [self._piece(n, 0, None) for n in range(first + 1, last)]
        pieces.append(self._piece(last, 0, end + 1))
        return np.concatenate(pieces).astype(np.int64)

    def _piece(self, number: int, start: int, end: int | None) -> np.ndarray:
        document = self.documents[number]
        size = self.corpus.sizes[document]
        begin = self.corpus.pointers[document] // self.corpus.dtype.itemsize
        return self.corpus.tokens[begin + start : begin + (size if end is None else min(end, size))]

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, as a collating loader stacks them."""
        rows = [self.sample(k) for k in range(start, start + count)]
        return np.stack([row[:-1] for row in rows]), np.stack([row[1:] for row in rows])


def write_corpus(prefix: Path, dtype: str, tokens: int = 1 << 25) -> str:
    """Random tokens in documents of 50 to 1,000."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 1001, tokens // 525)
    with IndexedWriter(prefix, 50000, dtype=np.dtype(dtype)) as writer:
        for part in np.array_split(lengths, 8):
            writer.add_documents(rng.integers(0, 50000, int(part.sum())), part)
        writer.finish()
    return str(prefix)


def write_large(prefix: Path, documents: int) -> str:
    """An index in full, a .bin without content."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        for dtype, slope, first, count in (("<i4", 0, LENGTH, documents), ("<i8", 2 * LENGTH, 0, documents),
                                           ("<i8", 1, 0, documents + 1)):
            for at in range(0, count, 1 << 20):
                file.write((first + slope * np.arange(at, min(at + (1 << 20), count))).astype(dtype).data)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(documents * LENGTH * 2)
    return str(prefix)


def opening(side: str, prefix: str) -> dict[str, float]:
    """In this process: wall and CPU seconds and bytes of memory until the first batch is there."""
    before, start, cpu = _peak(), time.perf_counter(), time.process_time()
    if side == OURS:
        samples = open_samples(prefix, seq_len=SEQ, seed=0, valid_fraction=0.01, vocab_size=50257)
        PretrainBatches(samples, FIRST, documents=True).step(0)
    else:
        UpFront(prefix).batch(0, FIRST)
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "bytes": _peak() - before}


def _peak() -> int:
    """Most bytes this process has had in memory. Linux counts in ru_maxrss what its parent had when it was forked."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cold(side: str, prefix: str) -> dict[str, float]:
    """In this process: wall seconds of samples whose tokens are on the disk only; index arrays are built before. Nobody
    may have the file mapped: the system keeps what is."""
    read = reader(side, prefix)
    with open(f"{prefix}.bin", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    read(0, COLD)
    return {"seconds": time.perf_counter() - start}


def elsewhere(what: str, side: str, prefix: str) -> dict[str, float]:
    """`opening` or `cold` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, side, prefix], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def reader(side: str, prefix: str) -> Callable[[int, int], Any]:
    """What reads samples start .. start + count - 1 as tokens and labels."""
    if side == THEIRS:
        return UpFront(prefix).batch
    samples = open_samples(prefix, seq_len=SEQ, seed=0, vocab_size=50257)
    documents = side == OURS_DOCUMENTS
    return lambda start, count: PretrainBatches(samples, count, documents=documents).step(start // count)


def samples_a_second(read: Callable[[int, int], Any], count: int) -> float:
    """Of a CPU second, in batches of `count`."""
    cpu = time.process_time()
    for start in range(0, READ, count):
        read(start, count)
    return READ / (time.process_time() - cpu)


def compare_opening(folder: Path, documents: int, rounds: int) -> tuple[list[list[str]], dict[str, Any]]:
    """The table and the medians of opening; the sides take turns."""
    prefix = write_large(folder / "large", documents)
    found: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for number in range(rounds):
        for side, runs in found.items():
            runs.append(elsewhere("opening", side, prefix))
        print(f"  round {number + 1}/{rounds}: "
              + ", ".join(f"{side} {runs[-1]['seconds']:.3f} s" for side, runs in found.items()), flush=True)
    for suffix in (".bin", ".idx"):
        os.unlink(f"{prefix}{suffix}")
    medians = {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
               for side, runs in found.items()}
    rows = [[f"first batch of {documents:,} documents", "seconds", "CPU s", "MB", "x our seconds"]]
    for side, m in medians.items():
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found[OURS], found[side], strict=True))
        rows.append([side, f"{m['seconds']:.3f}", f"{m['cpu']:.3f}", f"{m['bytes'] / 1e6:.0f}", f"{ratio:.1f}"])
    return rows, medians


def compare_reading(prefix: str, name: str, rounds: int) -> tuple[list[list[str]], dict[str, Any]]:
    """The tables of one corpus: samples a CPU second by batch, and the wall time of a cold batch."""
    counts = (1, 8, 64, 512)
    warm: dict[str, dict[int, list[float]]] = {side: {count: [] for count in counts} for side in SIDES}
    waits: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds if hasattr(os, "posix_fadvise") else 0):
        for side in SIDES:
            waits[side].append(elsewhere("cold", side, prefix)["seconds"])
    sides = {side: reader(side, prefix) for side in SIDES}
    for _ in range(rounds):
        for side, read in sides.items():
            for count in counts:
                warm[side][count].append(samples_a_second(read, count))
    rows = [[f"{name}: samples of {SEQ:,} a CPU second", *(f"batch {count}" for count in counts), f"cold {COLD}: ms"]]
    results: dict[str, Any] = {}
    for side in sides:
        rates = [statistics.median(warm[side][count]) for count in counts]
        ratios = [statistics.median(a / b for a, b in zip(warm[side][count], warm[THEIRS][count], strict=True))
                  for count in counts]
        seconds = statistics.median(waits[side]) if waits[side] else None
        rows.append([side, *(f"{rate:,.0f} ({ratio:.1f}x)" for rate, ratio in zip(rates, ratios, strict=True)),
                     f"{seconds * 1e3:.1f}" if seconds else "-"])
        results[side] = {"samples_per_cpu_s": dict(zip(map(str, counts), rates, strict=True)),
                         "ratio": dict(zip(map(str, counts), ratios, strict=True)), "cold_seconds": seconds}
    return rows, results


def main(argv: Sequence[str]) -> None:
    """Runs all of it and prints the tables."""
    if argv and argv[0] in ("opening", "cold"):
        print(json.dumps({"opening": opening, "cold": cold}[argv[0]](*argv[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000, help="documents of the corpus that is opened")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write 2.3 GB; the system's temporary folder if not given")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/data_loading.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows, opened = compare_opening(folder, args.documents, args.rounds)
        print(table(rows), end="\n\n")
        content: dict[str, Any] = {"documents": args.documents, "seq_len": SEQ, "opening": opened, "reading": {}}
        for dtype in ("u2", "i4"):
            kind = {"u2": "u16", "i4": "i32"}[dtype]
            rows, found = compare_reading(write_corpus(folder / kind, f"<{dtype}"), kind, args.rounds)
            print(table(rows), end="\n\n")
            content["reading"][kind] = found
    if args.save:
        print(keep("data_loading", content))


if __name__ == "__main__":
    main(sys.argv[1:])
