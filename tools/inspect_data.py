"""What a corpus holds: python tools/inspect_data.py P [--doc 17] [--verify] [--tokenizer T]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.quiet import end_quietly  # noqa: E402

if __name__ == "__main__":
    end_quietly()  # before the imports, which take seconds

from engine.config.command import Command, whole  # noqa: E402
from engine.data.indexed import bare_prefix  # noqa: E402
from engine.data.overview import overview, show_document, verify  # noqa: E402
from engine.errors import run_cli  # noqa: E402
from engine.tokenizer import load_tokenizer  # noqa: E402


def main(argv: list[str]) -> int:
    """Parses, looks, prints."""
    parser = Command("inspect_data.py", "Counts, lengths, one document, or a check of everything.")
    parser.add_argument("prefix", metavar="P", help="a corpus: P.bin and P.idx")
    parser.add_argument("--doc", type=whole(), metavar="N", help="show document N (the first is 0)")
    parser.add_argument("--verify", action="store_true", help="check every pointer, id and byte (checksums of P.json)")
    parser.add_argument("--tokenizer", metavar="T", help="to show text, and to know the vocabulary")
    args = parser.read(argv)
    args.prefix = bare_prefix(args.prefix)
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
