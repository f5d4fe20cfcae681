"""A corpus of any size opens at once and in little memory, and gives the right tokens past every 32-bit limit."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data import open_samples
from engine.data.indexed import IndexedDataset

HEADER = struct.Struct("<9sQBQQ")
LENGTH = 500
CHILD = """
import sys
import numpy

def peak():  # not ru_maxrss, which counts what the parent had when it was forked
    with open("/proc/self/status") as status:
        return int(status.read().partition("VmHWM:")[2].split()[0])

from engine.data import open_samples
before = peak()
samples = open_samples(sys.argv[1], seq_len=2048, seed=0, vocab_size=50000)
rows, begins = samples.rows(0, 64), samples.begins(0, 64)
print(samples.corpus.documents, rows.shape == begins.shape == (64, 2049), peak() - before)
"""


def write_pair(prefix: Path, documents: int, *, full: bool) -> None:
    """A corpus of `documents` documents of 500 tokens, u16. Its .bin is sparse; unless `full` its .idx is, too: only
    the entries that opening looks at are there."""
    idx = Path(f"{prefix}.idx")
    parts = [("<i4", 0, LENGTH), ("<i8", 2 * LENGTH, 0), ("<i8", 1, 0)]  # dtype, slope, first value
    with open(idx, "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        for number, (dtype, slope, first) in enumerate(parts):
            count = documents + (number == 2)
            begin = file.tell()
            for at in range(0 if full else count - 1, count, 1 << 20):
                values = first + slope * np.arange(at, min(at + (1 << 20), count))
                file.seek(begin + at * np.dtype(dtype).itemsize)
                file.write(values.astype(dtype).data)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(documents * LENGTH * 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_hundred_million_documents_take_little_memory_until_the_first_batch(tmp_path: Path) -> None:
    """Measured in a process of its own. Whatever reads, copies or builds an array over the documents would need 400 MB
    or more, and a search in a mapped index hundreds, by how much of it the system already has in memory."""
    write_pair(tmp_path / "c", 100_000_000, full=False)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "c")], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    documents, shapes, kilobytes = done.stdout.split()
    assert (documents, shapes) == ("100000000", "True")
    assert int(kilobytes) < 200_000


@pytest.mark.slow
def test_tokens_and_documents_past_two_to_the_31_and_4_gigabytes_are_the_right_ones(tmp_path: Path) -> None:
    """Five million documents, 2.5e9 tokens, 5 GB; marks lie around both limits and at the end."""
    documents, seq_len = 5_000_000, 2048
    write_pair(tmp_path / "c", documents, full=True)
    total = documents * LENGTH
    marks = {number: at for number, at in enumerate([0, 2**30 - 1, 2**31 - 1, 2**31, 2**32 // 2 + 1, total - 1], 1)}
    with open(tmp_path / "c.bin", "r+b") as file:
        for number, at in marks.items():
            file.seek(2 * at)
            file.write(struct.pack("<H", number))
    corpus = IndexedDataset(tmp_path / "c")
    around = np.maximum(np.array(list(marks.values())) - 3, 0)
    tokens = corpus.read(around, np.full(6, 3)), corpus.read(np.array(list(marks.values())), np.ones(6, np.int64))
    assert tokens[1].tolist() == list(marks)
    assert int(corpus.tokens[total - 1]) == 6 and corpus.token_start(documents - 1) == total - LENGTH

    samples = open_samples(str(tmp_path / "c"), seq_len=seq_len, seed=0, vocab_size=10)
    count = 400
    positions = samples.starts(np.arange(count))[:, None] + np.arange(seq_len + 1)
    rows, begins = samples.rows(0, count), samples.begins(0, count)
    assert positions.max() > 2**31
    np.testing.assert_array_equal(begins, positions % total % LENGTH == 0)
    marked = np.zeros_like(rows)
    for number, at in marks.items():
        marked[positions % total == at] = number
    np.testing.assert_array_equal(rows, marked)
    assert samples.epoch_size == total // seq_len
    last = samples.rows(samples.epoch_size - 1, 2)  # over an epoch's end
    assert last.shape == (2, seq_len + 1)
