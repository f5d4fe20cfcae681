"""What a corpus holds: python tools/inspect_data.py P [--doc 17] [--verify] [--tokenizer T]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.overview import overview, show_document, verify  # noqa: E402
from engine.errors import run_cli  # noqa: E402
from engine.tokenizer import load_tokenizer  # noqa: E402


def main(argv: list[str]) -> int:
    """Parses, looks, prints."""
    parser = argparse.ArgumentParser(description="Counts, lengths, one document, or a check of everything.")
    parser.add_argument("prefix", metavar="P", help="a corpus: P.bin and P.idx")
    parser.add_argument("--doc", type=int, metavar="N", help="show document N (the first is 0)")
    parser.add_argument("--verify", action="store_true", help="check every pointer, id and byte (checksums of P.json)")
    parser.add_argument("--tokenizer", metavar="T", help="to show text, and to know the vocabulary")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.doc is None:
        print("\n".join(overview(args.prefix)))
    else:
        print("\n".join(show_document(args.prefix, args.doc, tokenizer)))
    if args.verify:
        print(verify(args.prefix, tokenizer))
    return 0


if __name__ == "__main__":
    run_cli(main)
