"""Near-duplicate detection beside datasketch and datatrove: CPU time, memory, and what is found. Interleaved.

All sides compare documents by 14 bands of 8 MinHash values over word 5-grams of lower-cased text (Chinese: runs of 8
characters). datasketch's users cut the words themselves, here by a pattern, and its MinHashLSH groups. Of datatrove it
is the first stage (its own normaliser, tokenizer and signatures, English); groups are then found by a dictionary, which
costs it less than its own later stages do. Each turn is a fresh process, imports and a first document not counted.

Found: the share of constructed near-duplicates that agree with their original in a band. Recall: of the copies with a
Jaccard similarity of at least 0.8 the share that is dropped. Precision: of the dropped documents the share that has a
similarity of at least 0.5 to an earlier document of its group.

    python benchmarks/dedup.py [--data FILES..] [--chinese FILES..] [--templated FILE] [--rounds 5] [--save]

Files are JSONL with "text", or plain text with a document a line; without them texts are made here. Chinese documents
are those of which four fifths are Chinese characters: in mixed text a Latin word counts as a word here, as its letters
in the peer's runs. datasketch and datatrove take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import keep, table

from engine.data.dedup import Deduplicator, MinHash

BANDS, ROWS = 14, 8
_WORDS = re.compile(r"\w+")
_CHINESE = re.compile("[\u4e00-\u9fff。，、]")
_CUT = 4000
"""Characters of a document at most: longer articles are cut into several, or one document would be half the corpus."""
_EDITS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
_BOILERPLATE = (0.05, 0.1, 0.2, 0.4)


class Side(NamedTuple):
    """One way to find near-duplicates among given texts."""

    sign: Callable[[], Any]
    """Signs all texts."""
    group: Callable[[Any], list[int]]
    """The keeper of each text, by what sign returned."""
    keys: Callable[[Any], list[list[str]]]
    """A key for each band of each text, as strings, for comparison."""


def triax(texts: Sequence[str], is_chinese: bool) -> Side:
    method = MinHash(BANDS, ROWS)
    method.signatures(texts[:1])

    def group(signatures: np.ndarray) -> list[int]:
        with tempfile.TemporaryDirectory() as folder, Deduplicator(folder, method) as deduplicator:
            deduplicator.add(0, signatures)
            dropped = deduplicator.finish()
            return [dropped.keeper(document) for document in range(len(texts))]

    return Side(lambda: method.signatures(texts), group, lambda made: [[str(key) for key in row] for row in made])


def datasketch(texts: Sequence[str], is_chinese: bool) -> Side:
    from datasketch import MinHash as Theirs
    from datasketch import MinHashLSH

    def sign(text: str) -> Any:
        made = Theirs(num_perm=BANDS * ROWS)
        made.update_batch([shingle.encode() for shingle in shingles(text, is_chinese)])
        return made

    def group(signed: list[Any]) -> list[int]:
        index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        union = Union(len(texts))
        for document, made in enumerate(signed):
            for other in index.query(made):
                union.join(int(other), document)
            index.insert(str(document), made)
        return union.keepers()

    def keys(signed: list[Any]) -> list[list[str]]:
        return [[str(made.hashvalues[at : at + ROWS]) for at in range(0, BANDS * ROWS, ROWS)] for made in signed]

    sign(texts[0])
    return Side(lambda: list(map(sign, texts)), group, keys)


def datatrove(texts: Sequence[str], is_chinese: bool) -> Side:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    step = MinhashDedupSignature(tempfile.mkdtemp(), MinhashConfig(num_buckets=BANDS, hashes_per_bucket=ROWS))

    def sign(text: str) -> list[Any]:
        found = step.get_shingles(text)
        return [tuple(band) for band in step.get_signature(found)] if found.size else [text] * BANDS

    def group(signed: list[list[Any]]) -> list[int]:
        union = Union(len(texts))
        for band in range(BANDS):
            first: dict[Any, int] = {}
            for document, row in enumerate(signed):
                union.join(first.setdefault(row[band], document), document)
        return union.keepers()

    sign(texts[0])
    return Side(lambda: list(map(sign, texts)), group, lambda made: [[str(key) for key in row] for row in made])


SIDES = {"triax": triax, "datasketch": datasketch, "datatrove": datatrove}


class Union:
    """Groups by their lowest member, in memory."""

    def __init__(self, count: int) -> None:
        self.above = list(range(count))

    def root(self, document: int) -> int:
        while self.above[document] != document:
            document = self.above[document]
        return document

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self.above[high] = low

    def keepers(self) -> list[int]:
        return [self.root(document) for document in range(len(self.above))]


def shingles(text: str, is_chinese: bool) -> set[str]:
    """What the sides compare, as a set of strings."""
    words = _WORDS.findall(text.lower())
    pieces, width, glue = (list("".join(words)), 8, "") if is_chinese else (words, 5, " ")
    return {glue.join(pieces[at : at + width]) for at in range(max(len(pieces) - width + 1, 1))}


def similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def run_side(name: str, path: Path, is_chinese: bool) -> dict[str, Any]:
    """A turn, in this process."""
    if name == "many":
        return many()
    texts = json.loads(path.read_text())
    side = SIDES[name](texts, is_chinese)
    before = memory_now()
    start = time.process_time()
    made = side.sign()
    signed = time.process_time()
    keepers = side.group(made)
    done = time.process_time()
    peak = memory_peak() - before
    return {"sign": signed - start, "group": done - signed, "peak": peak, "keepers": keepers, "keys": side.keys(made)}


def memory_now() -> float:
    """Megabytes that are resident; the peak is counted from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_peak()


def memory_peak() -> float:
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def turn(name: str, texts: Sequence[str], is_chinese: bool = False) -> dict[str, Any]:
    """A turn in a process of its own, of a side or of "many"."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "texts.json", Path(folder) / "result.json"
        path.write_text(json.dumps(texts))
        subprocess.run([sys.executable, __file__, "--turn", name, str(path), str(out), str(is_chinese)], check=True)
        return json.loads(out.read_text())


def read(files: Sequence[str]) -> list[str]:
    """Documents of at most _CUT characters, no two alike."""
    lines = [(name, line) for name in files for line in Path(name).read_text().splitlines() if line.strip()]
    whole = [json.loads(line)["text"] if name.endswith(".jsonl") else line for name, line in lines]
    cut = [text[at : at + _CUT] for text in whole for at in range(0, len(text), _CUT)]
    return list(dict.fromkeys(text for text in cut if len(text) > 200))


def made_up(is_chinese: bool, documents: int = 600) -> list[str]:
    rng = random.Random(0)
    if is_chinese:
        return ["".join(chr(0x4E00 + int(rng.paretovariate(0.5)) % 6000) for _ in range(700)) for _ in range(documents)]
    vocabulary = ["".join(rng.choice("abdeiklmnoprstu") for _ in range(rng.randint(2, 9))) for _ in range(20000)]
    return [" ".join(vocabulary[int(rng.paretovariate(0.5)) % 20000] for _ in range(400)) for _ in range(documents)]


def edited(rng: random.Random, text: str, share: float, pool: Sequence[str], is_chinese: bool) -> str:
    """The text with a share of its words (characters) replaced by others of the corpus."""
    pieces = text if is_chinese else text.split(" ")
    return ("" if is_chinese else " ").join(rng.choice(pool) if rng.random() < share else piece for piece in pieces)


def framed(rng: random.Random, text: str, share: float, pool: Sequence[str], is_chinese: bool) -> str:
    """The text between a header and a footer, each half of share of its length, that no other document has."""
    count = round((len(text) if is_chinese else text.count(" ") + 1) * share / 2)
    glue = "" if is_chinese else " "
    head, foot = (glue.join(rng.choice(pool) for _ in range(count)) for _ in range(2))
    return glue.join([head, text, foot])


def construct(texts: Sequence[str], is_chinese: bool) -> dict[str, list[str]]:
    """A near-duplicate of each text, by kind of change."""
    rng = random.Random(1)
    pool = list("".join(texts[:200])) if is_chinese else " ".join(texts[:200]).split()
    unit = "characters" if is_chinese else "words"
    made = {f"{share:.1%} of {unit} replaced": [edited(rng, text, share, pool, is_chinese) for text in texts]
            for share in _EDITS}
    return made | {f"{share:.0%} boilerplate added": [framed(rng, text, share, pool, is_chinese) for text in texts]
                   for share in _BOILERPLATE}


def agree(keys: Sequence[Sequence[str]], one: int, other: int) -> bool:
    """Whether two documents have the same key in a band."""
    return any(a == b for a, b in zip(keys[one], keys[other], strict=True))


def chance(value: float) -> float:
    return 1 - (1 - value**ROWS) ** BANDS


def compare(sides: Sequence[str], originals: list[str], rounds: int, is_chinese: bool) -> dict[str, Any]:
    """Speed on the originals with all copies, and what was found among them."""
    made = construct(originals, is_chinese)
    corpus = originals + [text for copies in made.values() for text in copies]
    megabytes = sum(len(text.encode()) for text in corpus) / 1e6
    print(f"{len(corpus):,} documents, {megabytes:.1f} MB, {len(originals):,} of them originals")
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in sides:
            turns[name].append(turn(name, corpus, is_chinese))
    sets = [shingles(text, is_chinese) for text in corpus]
    result: dict[str, Any] = {"documents": len(corpus), "megabytes": megabytes, "sides": {},
                              "theory": theory(made, sets, len(originals))}
    for name in sides:
        sign, group, peak = (statistics.median(t[key] for t in turns[name]) for key in ("sign", "group", "peak"))
        result["sides"][name] = {
            "sign_seconds": sign, "group_seconds": group, "megabytes_per_second": megabytes / (sign + group),
            "peak_megabytes": peak, **found(turns[name][0], made, sets, len(originals)),
        }
    return result


def theory(made: dict[str, list[str]], sets: Sequence[set[str]], originals: int) -> dict[str, dict[str, float]]:
    """Mean similarity of copies and originals, and the chance that theory gives them."""
    kinds = {}
    for number, kind in enumerate(made, 1):
        values = [similarity(sets[n], sets[number * originals + n]) for n in range(originals)]
        kinds[kind] = {"similarity": statistics.mean(values), "found": statistics.mean(map(chance, values))}
    return kinds


def found(side: dict[str, Any], made: dict[str, list[str]], sets: Sequence[set[str]], originals: int) -> dict[str, Any]:
    keys, keepers = side["keys"], side["keepers"]
    kinds = {kind: statistics.mean(agree(keys, n, number * originals + n) for n in range(originals))
             for number, kind in enumerate(made, 1)}
    copies = range(originals, len(keepers))
    similar = [n for n in copies if similarity(sets[n % originals], sets[n]) >= 0.8]
    dropped = [n for n, keeper in enumerate(keepers) if keeper != n]
    members: dict[int, list[int]] = {}
    for document, keeper in enumerate(keepers):
        members.setdefault(keeper, []).append(document)
    right = [n for n in dropped if any(m < n and similarity(sets[m], sets[n]) >= 0.5 for m in members[keepers[n]])]
    return {"found": kinds, "dropped": len(dropped), "recall": sum(keepers[n] != n for n in similar) / len(similar),
            "precision": len(right) / len(dropped)}


def templated(sides: Sequence[str], name: str) -> dict[str, Any]:
    """Chats from templates: for bins of true similarity the share of pairs that is found. Such pairs share most of
    their words with many others, so they are found together or not at all: one set of hash functions says little."""
    rows = json.loads(Path(name).read_text())
    texts = ["\n".join(message["value"] for message in row["conversations"]) for row in rows]
    sets = [shingles(text, False) for text in texts]
    bins: dict[str, list[tuple[int, int, float]]] = {}
    for one, other in itertools.combinations(range(len(texts)), 2):
        value = similarity(sets[one], sets[other])
        bins.setdefault(f"{int(10 * value) / 10:.1f}", []).append((one, other, value))
    result: dict[str, Any] = {"documents": len(texts), "pairs": {}, "theory": {}, "sides": {}}
    for low, pairs in sorted(bins.items()):
        result["pairs"][low], result["theory"][low] = len(pairs), statistics.mean(chance(pair[2]) for pair in pairs)
    for side in sides:
        done = turn(side, texts)
        shares = {low: statistics.mean(agree(done["keys"], a, b) for a, b, _ in bins[low]) for low in sorted(bins)}
        result["sides"][side] = {"found": shares, "dropped": sum(k != n for n, k in enumerate(done["keepers"]))}
    result["mean_of_seeds"] = {low: mean_of_seeds(texts, pairs) for low, pairs in sorted(bins.items())}
    return result


def mean_of_seeds(texts: list[str], pairs: list[tuple[int, int, float]], seeds: int = 50) -> float:
    """The share of pairs that our signatures find, over sets of hash functions."""
    one, other = np.array([pair[:2] for pair in pairs]).T
    shares = []
    for seed in range(seeds):
        signatures = MinHash(BANDS, ROWS, seed).signatures(texts)
        same = np.zeros(len(pairs), bool)
        for band in signatures.T:
            same |= band[one] == band[other]
        shares.append(float(same.mean()))
    return statistics.mean(shares)


def many(documents: int = 2_000_000, memory: int = 64 << 20) -> dict[str, float]:
    """Our grouping alone, of random signatures in which a fifth of the documents has an earlier copy."""
    rng, step = np.random.default_rng(0), 10_000
    before = np.empty((step, BANDS), np.uint64)
    spent = 0.0
    with tempfile.TemporaryDirectory() as folder, Deduplicator(folder, MinHash(BANDS, ROWS), memory) as deduplicator:
        resident = memory_now()
        for at in range(0, documents, step):
            keys = rng.integers(0, 1 << 64, (step, BANDS), np.uint64)
            keys[::5] = before[::5]
            before = keys
            start = time.process_time()
            deduplicator.add(at, keys)
            spent += time.process_time() - start
        start = time.process_time()
        deduplicator.finish()
        spent += time.process_time() - start
    return {"documents": documents, "memory_megabytes": memory / (1 << 20), "microseconds": 1e6 * spent / documents,
            "peak_megabytes": memory_peak() - resident}


def show(title: str, result: dict[str, Any]) -> None:
    sides = result["sides"]
    ours = sides["triax"]["megabytes_per_second"]
    rows = [[title, "MB/CPU-s", "triax is", "sign s", "group s", "peak MB", "recall", "precision"]]
    for name, side in sides.items():
        rows.append([name, f"{side['megabytes_per_second']:.1f}", f"{ours / side['megabytes_per_second']:.1f} x",
                     f"{side['sign_seconds']:.2f}", f"{side['group_seconds']:.2f}", f"{side['peak_megabytes']:.0f}",
                     f"{side['recall']:.3f}", f"{side['precision']:.4f}"])
    print(table(rows), end="\n\n")
    rows = [["found of", "similarity", "theory", *sides]]
    for kind, expected in result["theory"].items():
        rows.append([kind, f"{expected['similarity']:.3f}", f"{expected['found']:.3f}",
                     *(f"{side['found'][kind]:.3f}" for side in sides.values())])
    print(table(rows), end="\n\n")


def show_templated(result: dict[str, Any]) -> None:
    sides = result["sides"]
    rows = [["from templates, similarity", "pairs", "theory", "50 seeds of triax", *sides]]
    for low, pairs in result["pairs"].items():
        shares = (f"{side['found'][low]:.3f}" for side in sides.values())
        expected = (f"{result[name][low]:.3f}" for name in ("theory", "mean_of_seeds"))
        rows.append([f"{low} to {float(low) + 0.1:.1f}", f"{pairs:,}", *expected, *shares])
    rows.append([f"dropped of {result['documents']}", "", "", "", *(str(side["dropped"]) for side in sides.values())])
    print(table(rows), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--chinese"):
        parser.add_argument(name, nargs="+", default=[])
    parser.add_argument("--templated", help="a JSON list of chats with many near-duplicates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--turn", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        name, path, out, is_chinese = args.turn
        Path(out).write_text(json.dumps(run_side(name, Path(path), is_chinese == "True")))
        return
    peers = [name for name in ("datasketch", "datatrove") if importlib.util.find_spec(name)]
    result: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in peers}}
    result["english"] = compare(["triax", *peers], read(args.data) or made_up(False), args.rounds, False)
    show("English", result["english"])
    # datatrove's Chinese tokenizer is a neural network of another package: no match for a hash.
    chinese = ["triax", *(name for name in peers if name != "datatrove")]
    texts = [text for text in read(args.chinese) if 5 * len(_CHINESE.findall(text)) >= 4 * sum(map(len, text.split()))]
    result["chinese"] = compare(chinese, texts or made_up(True), args.rounds, True)
    show("Chinese", result["chinese"])
    if args.templated:
        result["templated"] = templated(["triax", *peers], args.templated)
        show_templated(result["templated"])
    result["many"] = turn("many", [])
    print(result["many"])
    if args.save:
        print(keep("dedup", result))


if __name__ == "__main__":
    main()
