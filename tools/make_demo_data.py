"""A small corpus without a download: python tools/make_demo_data.py --output DIR"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.quiet import end_quietly  # noqa: E402

if __name__ == "__main__":
    end_quietly()  # before the imports, which take seconds

from engine.config.command import Command, real  # noqa: E402
from engine.data.demo import make_demo  # noqa: E402
from engine.errors import run_cli  # noqa: E402


def main(argv: list[str]) -> int:
    """Parses, writes the files, prints their counts."""
    parser = Command("make_demo_data.py", "Make a demonstration corpus from Python's own documentation.")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--megabytes", type=real(-1e9, 1e9), default=4.0,
                        help="cut the corpus there (the library has about 2)")
    args = parser.read(argv)
    counts = make_demo(Path(args.output), args.megabytes)
    print(
        f"{args.output}: corpus.jsonl {counts.documents:,} documents ({counts.megabytes:.2f} MB), heldout.jsonl "
        f"{counts.held_out:,}, instructions.jsonl {counts.instructions:,}, heldout_instructions.jsonl "
        f"{counts.held_out_instructions:,}"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
