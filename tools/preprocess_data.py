"""Text to tokens on disk: python tools/preprocess_data.py --input F... --tokenizer T --output-prefix P"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.inputs import SPLITS, UNIT_BYTES  # noqa: E402
from engine.data.preprocess import DEFAULT_SEED, Settings, preprocess  # noqa: E402
from engine.errors import run_cli  # noqa: E402


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn JSONL or plain text (also .gz) into P.bin, P.idx and P.json.")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tokenizer", required=True, help="a .model file, or a folder with tokenizer.model or .json")
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument("--json-key", default="text")
    parser.add_argument("--split-text", choices=SPLITS, default="document", help="what a document is in plain text")
    parser.add_argument("--encoding", default="utf-8", help="of text without a byte-order mark")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--shuffle-seed", type=int, default=DEFAULT_SEED, help=f"order of documents ({DEFAULT_SEED})")
    order.add_argument("--no-shuffle", action="store_true", help="keep the input's order")
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad record")
    parser.add_argument("--workers", type=int, help="processes (one a core); the output does not depend on it")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--unit-megabytes", type=int, default=UNIT_BYTES >> 20, metavar="N",
                        help="what a process works on at a time, and what a killed run may lose")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Parses, preprocesses, prints what came out."""
    args = _arguments(argv)
    begun = time.monotonic()
    counts = preprocess(
        Settings(
            inputs=args.input,
            tokenizer=args.tokenizer,
            output_prefix=args.output_prefix,
            json_key=args.json_key,
            split_text=args.split_text,
            shuffle_seed=None if args.no_shuffle else args.shuffle_seed,
            append_eod=args.append_eod,
            on_error=args.on_error,
            workers=args.workers,
            overwrite=args.overwrite,
            encoding=args.encoding,
            unit_bytes=args.unit_megabytes << 20,
        )
    )
    for fault in counts.faults:
        print(f"skipped {fault}", file=sys.stderr)
    seconds = time.monotonic() - begun
    print(
        f"{args.output_prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
        f"{counts.text_bytes / max(counts.tokens, 1):.3f} bytes per token; {counts.empty:,} empty and "
        f"{counts.skipped:,} bad records left out; {seconds:.1f} s, {counts.text_bytes / 1e6 / seconds:.1f} MB/s"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
