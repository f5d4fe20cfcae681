"""Text to tokens on disk, beside Megatron-LM's method.

Its method, as its tools/preprocess_data.py has it, written here plainly: a process pool parses each line's JSON,
encodes the document by itself with sentencepiece, appends the end of document, and sends the list of ids to one
process, which writes .bin and .idx. (Its own tool imports torch first; this one does not.) Ours is the README's command
with --no-shuffle. The files of the two have to be the same, byte for byte, or there is no result.

A turn goes from the command's start to its end, with all its processes: CPU seconds and wall seconds. Turns alternate;
medians. One turn more, which is not timed as being watched takes time, tells the most memory (PSS) that they had
together. How two workers of ours compare with one is told by a larger corpus: of a few seconds much is start-up.

    python benchmarks/preprocess.py [--english JSONL] [--chinese JSONL] [--large JSONL] [--model M] [--rounds 5]
        [--patience 600] [--save]

Files are JSONL with "text", no two documents alike; without them texts are made here, the large corpus by repetition.
M: a sentencepiece BPE model; by default one is trained on the texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import ROOT, Quiet, keep, table
from dedup import made_up

OURS, THEIRS = "triax", "Megatron-LM's method"
_LARGE = 500
"""Megabytes."""
_CHUNK = 32
"""Lines a worker gets at a time, as in Megatron-LM."""


class Cost(NamedTuple):
    """What a command took."""

    cpu: float
    wall: float


def baseline(text: str, model: str, prefix: str, workers: int) -> None:
    """Megatron-LM's method: writes prefix.bin and prefix.idx."""
    lengths: list[int] = []
    pool = multiprocessing.Pool(workers, _load, (model,))
    with open(text, encoding="utf-8") as lines, open(f"{prefix}.bin", "wb") as out:
        for ids in pool.imap(_encode, lines, _CHUNK):
            out.write(np.array(ids, np.uint16).tobytes())
            lengths.append(len(ids))
    pool.close()
    pool.join()
    sizes = np.array(lengths, np.int32)
    pointers = np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64))) * 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1))
        for array in (sizes, pointers.astype(np.int64), np.arange(len(sizes) + 1, dtype=np.int64)):
            file.write(array.tobytes())


def _load(model: str) -> None:
    import sentencepiece

    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(line: str) -> list[int]:
    ids: list[int] = _processor.EncodeAsIds(json.loads(line)["text"])
    ids.append(_processor.eos_id())
    return ids


def command(side: str, text: Path, model: str, folder: Path, workers: int) -> list[str]:
    """One of the two tools, writing folder/side.bin and .idx."""
    if side == THEIRS:
        return [__file__, "--baseline", str(text), model, str(folder / side), str(workers)]
    return ["tools/preprocess_data.py", "--input", str(text), "--tokenizer", model, "--no-shuffle", "--overwrite",
            "--workers", str(workers), "--output-prefix", str(folder / side)]


def cost(command: Sequence[str], watch: Callable[[int], None] = lambda pid: None) -> Cost:
    """Runs a Python command and all the processes it starts. watch: is called with its process while it runs."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode()}")
    return Cost(usage.ru_utime + usage.ru_stime, wall)


def peak(command: Sequence[str]) -> float:
    """The most memory that a command and all the processes it starts have together, in megabytes (Linux)."""
    peaks = [0.0]

    def watch(pid: int) -> None:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            peaks.append(sum(map(_megabytes, _tree(pid))))
            time.sleep(0.05)

    cost(command, watch)
    return max(peaks)


def _tree(pid: int) -> Iterator[int]:
    """A process and its descendants (Linux)."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _megabytes(pid: int) -> float:
    try:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return 0.0
    return int(found[1]) / 1000 if found else 0.0


def compare_tools(text: Path, model: str, sides: Sequence[str], rounds: int, quiet: Quiet) -> dict[str, Any]:
    """Tools with one worker and with two, on one corpus."""
    turns: dict[str, dict[int, list[Cost]]] = {side: {1: [], 2: []} for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            for workers in (1, 2):
                for side, kept in turns.items():
                    given = command(side, text, model, folder, workers)
                    kept[workers].append(quiet.turn(lambda given=given: cost(given)))
                check_equal(folder, sides)
        peaks = {side: {workers: peak(command(side, text, model, folder, workers)) for workers in (1, 2)}
                 for side in sides}
        tokens = (folder / f"{OURS}.bin").stat().st_size // 2
    texts = read(text)
    megabytes = sum(len(one.encode()) for one in texts) / 1e6
    found = {f"{side}, {workers} worker{'s' * (workers > 1)}": {**median(costs), "peak": peaks[side][workers]}
             for side, kept in turns.items() for workers, costs in kept.items()}
    for one in found.values():
        one |= {"megabytes_per_cpu_second": megabytes / one["cpu"], "megabytes_per_second": megabytes / one["wall"],
                "tokens_per_second": tokens / one["wall"]}
    return {"documents": len(texts), "megabytes": megabytes, "tokens": tokens, "sides": found,
            "cpu_times_less": {side: {workers: ratio([c.cpu for c in turns[OURS][workers]], [c.cpu for c in costs])
                                      for workers, costs in kept.items()} for side, kept in turns.items()},
            "two_workers_of_one": ratio(*([c.wall for c in turns[OURS][workers]] for workers in (2, 1)))}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of how often ours goes into theirs."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def median(costs: Sequence[Cost]) -> dict[str, float]:
    """The median of each figure."""
    columns = zip(*costs, strict=True)
    return {name: statistics.median(column) for name, column in zip(Cost._fields, columns, strict=True)}


def check_equal(folder: Path, sides: Sequence[str]) -> None:
    """Ends the program if the tools' files differ."""
    for suffix in ("bin", "idx"):
        if len({hashlib.sha256((folder / f"{side}.{suffix}").read_bytes()).digest() for side in sides}) > 1:
            raise SystemExit(f"the .{suffix} of the two tools differ: no figures")


def read(path: Path) -> list[str]:
    """The documents of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write(path: Path, texts: Iterable[str]) -> Path:
    """Documents as JSONL."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def drawn(texts: Sequence[str], megabytes: float) -> Iterator[str]:
    """Documents with repetition, until there are as many megabytes."""
    rng, size = random.Random(0), 0
    while size < megabytes * 1e6:
        text = rng.choice(texts)
        size += len(text.encode())
        yield text


def show(title: str, one: dict[str, Any]) -> None:
    """The table of a corpus."""
    print(f"\n{title}: {one['documents']:,} documents, {one['megabytes']:.1f} MB, {one['tokens']:,} tokens; two of our "
          f"workers are {one['two_workers_of_one']:.2f} x one")
    for side, less in one["cpu_times_less"].items():
        if side != OURS:
            print(f"{side} takes {less[1]:.2f} x triax' CPU time with one worker, {less[2]:.2f} x with two")
    rows = [["", "CPU s", "wall s", "MB/CPU-s", "MB/s", "tokens/s", "peak MB"]]
    rows += [[side, f"{c['cpu']:.2f}", f"{c['wall']:.2f}", f"{c['megabytes_per_cpu_second']:.1f}",
              f"{c['megabytes_per_second']:.1f}", f"{c['tokens_per_second']:,.0f}", f"{c['peak']:.0f}"]
             for side, c in one["sides"].items()]
    print(table(rows))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each language, as it is and large."""
    quiet = Quiet(args.patience)
    corpora = {name: Path(given) if given else write(folder / f"{name}.jsonl", list(dict.fromkeys(made_up(chinese))))
               for name, given, chinese in (("english", args.english, False), ("chinese", args.chinese, True))}
    model = args.model or trained(corpora.values(), folder / "model")
    result: dict[str, Any] = {}
    for name, text in corpora.items():
        result[name] = compare_tools(text, model, (OURS, THEIRS), args.rounds, quiet)
        show(name, result[name])
    large = Path(args.large) if args.large else write(folder / "large.jsonl", drawn(read(corpora["english"]), _LARGE))
    result["large"] = compare_tools(large, model, (OURS,), args.rounds, quiet)
    show("large", result["large"])
    print(f"\n{quiet}")
    return {**result, "quiet": str(quiet)}


def trained(corpora: Iterable[Path], folder: Path) -> str:
    """A model of 8,000 pieces."""
    subprocess.run([sys.executable, "tools/train_tokenizer.py", "--input", *map(str, corpora), "--vocab-size", "8000",
                    "--output", str(folder)], cwd=ROOT, check=True)
    return str(folder / "tokenizer.model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--english", "--chinese", "--large", "--model"):
        parser.add_argument(name)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for a quiet machine, in all")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--baseline", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.baseline:
        text, model, prefix, workers = args.baseline
        baseline(text, model, prefix, int(workers))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, Path(folder))
    if args.save:
        print(keep("preprocess", result))


if __name__ == "__main__":
    main()
