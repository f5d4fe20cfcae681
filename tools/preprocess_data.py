"""Text to tokens on disk: python tools/preprocess_data.py --input F... --tokenizer T --output-prefix P
On many machines: mpirun -n N python tools/preprocess_data.py (the same)"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.quiet import end_quietly  # noqa: E402

if __name__ == "__main__":
    end_quietly()  # before the imports, which take seconds
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy starts a thread a core in every worker, for nothing

from engine.config.command import Command, whole  # noqa: E402
from engine.data.indexed import output_prefix  # noqa: E402
from engine.data.inputs import SPLITS, lost_whole  # noqa: E402
from engine.data.preprocess import DEFAULT_SEED, HOW_TO_GET_ONE, Counts, Settings, preprocess  # noqa: E402
from engine.errors import UserError, run_cli  # noqa: E402


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Command(
        "preprocess_data.py",
        "Turn text into P.bin, P.idx and P.json: JSONL, JSON arrays, plain text, parquet and MediaWiki "
        "dumps, each also as .gz, .bz2, .xz or .zst. A run that was ended goes on where it stopped.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="F", dest="inputs",
                        help="files, folders, patterns")
    parser.add_argument("--tokenizer", help="needed: a .model file, or a folder with tokenizer.model or .json")
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument("--json-key", default="text", help="where the text is, in JSON and parquet")
    parser.add_argument("--split-text", choices=SPLITS, default="document", help="what a document is in plain text")
    parser.add_argument("--encoding", default="utf-8", help="of text without a byte-order mark")
    parser.add_argument("--clean", nargs="?", const="all", default="none", metavar="STEPS",
                        help="change text: nfc,control,whitespace (all)")
    parser.add_argument("--quality", nargs="?", const="default", default="none", metavar="RULES",
                        help="leave out what fails a rule: default, gopher, fineweb, or names with thresholds")
    parser.add_argument("--dedup", default="none", metavar="HOW", help="exact, near, near:BANDSxROWS or none")
    parser.add_argument("--report", metavar="FILE", help="write what the rules left out, with samples")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--shuffle-seed", type=whole(), default=DEFAULT_SEED,
                       help=f"order of documents ({DEFAULT_SEED})")
    order.add_argument("--no-shuffle", action="store_const", const=None, dest="shuffle_seed",
                       help="keep the input's order")
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad record")
    parser.add_argument("--workers", type=whole(), help="processes (one a core); the output does not depend on it")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--unit-megabytes", type=whole(-1 << 20, 1 << 20), metavar="N",
                        help="what a process works on at a time, and may lose when it is killed (2 to 16)")
    args = parser.read(argv)
    if args.tokenizer is None:
        raise UserError(f"--tokenizer is needed: {HOW_TO_GET_ONE}")
    return args


def _summary(prefix: str, counts: Counts, seconds: float) -> str:
    gone = {"empty": counts.empty, "bad": counts.skipped, "duplicate": counts.duplicates, **counts.dropped}
    pages = f"; pages that are no articles: {sum(counts.left_out.values()):,}" if counts.left_out else ""
    left_out = ", ".join(f"{number:,} {name}" for name, number in gone.items() if number or name in ("empty", "bad"))
    return (
        f"{prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
        f"{counts.text_bytes / max(counts.tokens, 1):.3f} bytes per token; left out: {left_out}{pages}; "
        f"{seconds:.1f} s, {counts.input_bytes / 1e6 / seconds:.1f} MB/s"
    )


def main(argv: list[str]) -> int:
    """Parses, preprocesses, prints what came out."""
    args = vars(_arguments(argv))
    begun = time.monotonic()
    megabytes = args.pop("unit_megabytes")
    args["output_prefix"] = output_prefix(args["output_prefix"])
    settings = Settings(unit_bytes=megabytes if megabytes is None else megabytes << 20, **args)
    try:
        counts = preprocess(settings)
    except KeyboardInterrupt:
        return 130
    if counts is not None:
        for fault in counts.faults:
            print(f"skipped {fault}", file=sys.stderr)
        print(_summary(settings.output_prefix, counts, time.monotonic() - begun))
        if counts.lost:
            print(f"error: {lost_whole(counts.lost)}; the corpus is written without", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    run_cli(main)
