"""Trains a vocabulary: python tools/train_tokenizer.py --input F... --vocab-size 32000 --output DIR"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.readers import SPLITS, find_sources, read_documents  # noqa: E402
from engine.errors import UserError, run_cli  # noqa: E402
from engine.tokenizer.train import train  # noqa: E402


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a sentencepiece vocabulary from JSONL or text (also .gz).")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--special", default="<|im_start|>,<|im_end|>", help="control pieces, separated by commas")
    parser.add_argument("--json-key", default="text")
    parser.add_argument("--split-text", choices=SPLITS, default="blank", help="what a document is in plain text")
    parser.add_argument("--max-megabytes", type=int, default=512, help="read about this much, a share of each file")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Parses, trains, prints what was learned."""
    args = _arguments(argv)
    output = Path(args.output)
    if (output / "tokenizer.model").exists() and not args.overwrite:
        raise UserError(f"{output} already holds a tokenizer; choose another --output or say --overwrite")
    total = sum(source.size for source in find_sources(args.input))
    limit = args.max_megabytes << 20
    if total > limit:
        print(f"reading about {args.max_megabytes} MB of {total / 2**20:,.0f} MB (--max-megabytes)")
    report = train(
        lambda: read_documents(args.input, args.json_key, args.split_text, limit),
        output,
        vocab_size=args.vocab_size,
        model=args.model,
        special=[piece for piece in args.special.split(",") if piece],
    )
    print(
        f"{output}: {report.vocab_size} pieces; {report.covered:.4%} of characters have a piece of their own, the rest "
        f"is spelled in bytes; {report.bytes_per_token:.3f} bytes per token on {report.measured_bytes / 2**20:.1f} MB"
    )
    if args.model == "unigram":
        print("tokenizer.json is written for bpe only; this folder holds tokenizer.model")
    return 0


if __name__ == "__main__":
    run_cli(main)
