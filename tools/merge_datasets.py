"""Several corpora into one: python tools/merge_datasets.py --input P1 P2 .. --output-prefix P"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.quiet import end_quietly  # noqa: E402

if __name__ == "__main__":
    end_quietly()  # before the imports, which take seconds

from engine.config.command import Command  # noqa: E402
from engine.data.combine import combine  # noqa: E402
from engine.data.indexed import bare_prefix, output_prefix  # noqa: E402
from engine.errors import run_cli, shown  # noqa: E402


def main(argv: list[str]) -> int:
    """Parses, copies, prints what came out."""
    parser = Command("merge_datasets.py", "Put corpora (P.bin, P.idx) of one vocabulary one after another.")
    parser.add_argument("--input", nargs="+", required=True, metavar="P", help="prefixes, in the order they get")
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.read(argv)
    prefix = output_prefix(args.output_prefix)
    done = combine([bare_prefix(name) for name in args.input], prefix, args.overwrite)
    print(f"{prefix}: {done.documents:,} documents, {done.tokens:,} tokens of {len(args.input)} corpora")
    for first, copy in done.copies:
        print(f"{shown(first)} and {shown(copy)} hold the same tokens, by their checksums: their documents are there "
              "twice")
    if not done.described:
        print("not every corpus has a .json to tell its tokenizer, so none is written: make sure that they share one "
              "(and nothing proves the bytes of what was joined)")
    return 0


if __name__ == "__main__":
    run_cli(main)
