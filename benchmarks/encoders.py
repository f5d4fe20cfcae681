"""Encoders beside the libraries their vocabularies belong to, and wikitext to text beside mwparserfromhell.

CPU seconds of one process that has loaded vocabulary and texts and has encoded nothing before: the memo starts empty.
The libraries encode batches of 1,000 texts in one thread; the ids stay what they give, lists. All sides have to give
the same number of tokens (that the ids are the same is for tests). Turns alternate; medians.

    python benchmarks/encoders.py [--texts NAME=JSONL ..] [--model M] [--json T] [--gpt2 G] [--dump XML.BZ2 ..]
        [--rounds 5] [--patience 600] [--save]

Files are JSONL with "text", no two documents alike. M: a sentencepiece BPE model; T: a folder with its twin as
tokenizer.json; G: a folder with GPT-2's files. Peers that are not installed (tokenizers, tiktoken, mwparserfromhell)
are left out. Without --texts English and Chinese texts are made here; without a vocabulary one is trained on them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import Quiet, keep, table
from dedup import made_up
from preprocess import OURS, read, trained, write

PEERS = ("sentencepiece", "tokenizers", "tiktoken", "mwparserfromhell")
Encode = Callable[[list[str]], int]
"""Texts to the number of their tokens."""
Load = Callable[[], Encode]
_BATCH = 1000


def encoders(args: argparse.Namespace) -> dict[str, dict[str, Load]]:
    """By vocabulary, by side: what loads an encoder."""
    found: dict[str, dict[str, Load]] = {}
    if args.model:
        found["sentencepiece"] = {OURS: lambda: ours(args.model),
                                  "sentencepiece": lambda: sentencepiece_batch(args.model)}
    if args.json:
        found["tokenizer.json"] = {OURS: lambda: ours(args.json), "tokenizers": lambda: tokenizers_batch(args.json)}
    if args.gpt2:
        found["GPT-2"] = {OURS: lambda: ours(args.gpt2), "tokenizers": lambda: tokenizers_batch(args.gpt2),
                          "tiktoken": lambda: tiktoken_batch(args.gpt2)}
    here = {OURS, *installed()}
    return {name: {side: load for side, load in sides.items() if side in here} for name, sides in found.items()}


def ours(folder: str) -> Encode:
    """A tokenizer of Triax."""
    from engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.describe()  # builds the encoder
    return lambda texts: int(tokenizer.encode_documents(texts)[1].sum())


def sentencepiece_batch(path: str) -> Encode:
    """sentencepiece's Encode of many texts."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    return lambda texts: sum(len(ids) for batch in batches(texts) for ids in processor.Encode(batch, num_threads=1))


def tokenizers_batch(folder: str) -> Encode:
    """tokenizers' encode_batch_fast, of a tokenizer.json or of GPT-2's files."""
    import tokenizers

    path = Path(folder) / "tokenizer.json"
    if path.exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    else:
        vocab, merges = map(str, gpt2_files(folder))
        tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(vocab, merges)._tokenizer
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> int:
        made = (tokenizer.encode_batch_fast(batch, add_special_tokens=False) for batch in batches(texts))
        return sum(len(one.ids) for some in made for one in some)

    return encode


def tiktoken_batch(folder: str) -> Encode:
    """tiktoken's encode_ordinary_batch with GPT-2's vocabulary."""
    import tiktoken

    from engine.tokenizer.bpe import byte_alphabet

    byte_of = {shown: byte for byte, shown in byte_alphabet().items()}
    pieces = json.loads(gpt2_files(folder)[0].read_text(encoding="utf-8"))
    ranks = {bytes(map(byte_of.__getitem__, piece)): rank for piece, rank in pieces.items() if set(piece) <= {*byte_of}}
    del ranks[b"<|endoftext|>"]
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: sum(
        len(ids) for batch in batches(texts) for ids in encoding.encode_ordinary_batch(batch, num_threads=1)
    )


def gpt2_files(folder: str) -> tuple[Path, Path]:
    """The vocabulary and the merges."""
    names = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    return next((Path(folder) / one, Path(folder) / two) for one, two in names if (Path(folder) / one).exists())


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Texts, some at a time."""
    return (texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH))


def wikitext(side: str, dumps: Sequence[str]) -> dict[str, float]:
    """In this process: wikitext of articles to text; the XML is parsed before the clock starts."""
    from engine.data.wiki import Page, article, parse_page, read_pages, read_site

    pages = []
    for path in dumps:
        site = read_site(path)
        found = (parse_page(raw, site) for raw in read_pages(path, 0, Path(path).stat().st_size))
        pages += [(page, site) for page in found if isinstance(page, Page)]
    megabytes = sum(len(page.wikitext.encode()) for page, _ in pages) / 1e6
    if side == OURS:
        article(*pages[0])
        start = time.process_time()
        for page, site in pages:
            article(page, site)
    else:
        import mwparserfromhell

        start = time.process_time()
        for page, _ in pages:
            mwparserfromhell.parse(page.wikitext).strip_code()
    return {"megabytes": megabytes, "cpu": time.process_time() - start}


def encoding(args: argparse.Namespace, vocabulary: str, side: str, texts: list[str]) -> dict[str, float]:
    """In this process: CPU seconds of a side for all texts."""
    encode = encoders(args)[vocabulary][side]()
    start = time.process_time()
    tokens = encode(texts)
    return {"cpu": time.process_time() - start, "tokens": tokens}


def elsewhere(args: argparse.Namespace, what: Sequence[str]) -> dict[str, float]:
    """One turn of `encoding` or `wikitext`, in a process of its own."""
    given = [f"--{name}={value}" for name in ("model", "json", "gpt2") if (value := getattr(args, name))]
    done = subprocess.run([sys.executable, __file__, *given, "--turn", *what], stdout=subprocess.PIPE, check=True,
                          env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare_encoders(args: argparse.Namespace, text: Path, quiet: Quiet) -> dict[str, Any]:
    """Megabytes of text a CPU second, by vocabulary and side."""
    megabytes = sum(len(one.encode()) for one in read(text)) / 1e6
    result: dict[str, Any] = {}
    for vocabulary, sides in encoders(args).items():
        turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, kept in turns.items():
                kept.append(quiet.turn(lambda v=vocabulary, s=side: elsewhere(args, [v, s, str(text)])))
        counts = {side: kept[0]["tokens"] for side, kept in turns.items()}
        if len(set(counts.values())) > 1:
            raise SystemExit(f"the sides do not give the same tokens: {counts}")
        result[vocabulary] = {"tokens": counts[OURS], **rates(turns, megabytes)}
    return result


def rates(turns: dict[str, list[dict[str, float]]], megabytes: float) -> dict[str, Any]:
    """Megabytes a CPU second of each side, and how often ours goes into the others."""
    seconds = {side: [turn["cpu"] for turn in kept] for side, kept in turns.items()}
    return {
        "megabytes": megabytes,
        "megabytes_per_cpu_second": {side: megabytes / statistics.median(kept) for side, kept in seconds.items()},
        "times_less": {side: statistics.median(b / a for a, b in zip(seconds[OURS], kept, strict=True))
                       for side, kept in seconds.items() if side != OURS},
    }


def compare_wikitext(args: argparse.Namespace, quiet: Quiet) -> dict[str, Any]:
    """Megabytes of wikitext a CPU second."""
    sides = [OURS, *({"mwparserfromhell"} & {*installed()})]
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, kept in turns.items():
            kept.append(quiet.turn(lambda side=side: elsewhere(args, ["wikitext", side, *args.dump])))
    megabytes = turns[OURS][0]["megabytes"]
    return rates(turns, megabytes)


def installed() -> dict[str, str]:
    """The peers that are here, with their versions."""
    return {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}


def turn(args: argparse.Namespace) -> dict[str, float]:
    """A turn, in this process."""
    what, side, *files = args.turn
    return wikitext(side, files) if what == "wikitext" else encoding(args, what, side, read(Path(files[0])))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each corpus with each vocabulary, then wikitext."""
    quiet = Quiet(args.patience)
    corpora = {name: Path(path) for name, path in (given.split("=", 1) for given in args.texts)} or {
        name: write(folder / f"{name}.jsonl", made_up(name == "chinese")) for name in ("english", "chinese")}
    if not (args.model or args.json or args.gpt2):
        args.model = trained(corpora.values(), folder / "model")
    result: dict[str, Any] = {"versions": installed()}
    for name, text in corpora.items():
        result[name] = compare_encoders(args, text, quiet)
        for vocabulary, one in result[name].items():
            show(f"{name}, {vocabulary}", one)
    if args.dump:
        result["wikitext"] = compare_wikitext(args, quiet)
        show("wikitext", result["wikitext"])
    print(f"\n{quiet}")
    return {**result, "quiet": str(quiet)}


def show(title: str, one: dict[str, Any]) -> None:
    """Sides with their rates."""
    rows = [[f"{title}, {one['megabytes']:.1f} MB", "MB/CPU-s", "triax is"]]
    rows += [[side, f"{rate:.1f}", f"{one['times_less'].get(side, 1):.1f} x"]
             for side, rate in one["megabytes_per_cpu_second"].items()]
    print(f"\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=JSONL")
    for name in ("--model", "--json", "--gpt2"):
        parser.add_argument(name)
    parser.add_argument("--dump", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for a quiet machine, in all")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--turn", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(turn(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, Path(folder))
    if args.save:
        print(keep("encoders", result))


if __name__ == "__main__":
    main()
