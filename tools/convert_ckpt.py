"""Converts a checkpoint to a Hugging Face folder, or a Hugging Face folder to a run folder that --load takes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.quiet import end_quietly  # noqa: E402

if __name__ == "__main__":
    end_quietly()  # before the imports, which take seconds

from engine.checkpoint import DTYPES, resolve  # noqa: E402
from engine.config.command import Command, real  # noqa: E402
from engine.errors import UserError, run_cli  # noqa: E402
from engine.hf.convert import check_output, convert  # noqa: E402
from engine.hf.verify import verify  # noqa: E402


def main(argv: list[str]) -> int:
    """Parses, converts, verifies; 1 when --verify finds a difference."""
    parser = Command("convert_ckpt.py", __doc__)
    parser.add_argument("--load", required=True, type=Path, metavar="DIR",
                        help="run folder (its latest step), step folder or Hugging Face folder")
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="the folder to make; must not exist")
    parser.add_argument("--to", choices=("hf", "engine"), help="what to write; if not given, what --load is not")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="format of the weights; if not given, as they are")
    parser.add_argument("--shard-gb", type=real(), default=5.0, help="largest file of a Hugging Face folder [5]")
    parser.add_argument("--verify", action="store_true",
                        help="read the result again: every tensor bit for bit, the ids of texts of many scripts, and "
                        "transformers' logits if installed")
    parser.add_argument("--force", action="store_true",
                        help="convert a tokenizer too that cannot be loaded, or that no tokenizer.json can express "
                        "exactly")
    options = parser.read(argv)
    if not 0 < options.shard_gb <= 5:
        raise UserError(f"--shard-gb {options.shard_gb} must be above 0 and at most 5")
    start = time.perf_counter()
    check_output(options.load, options.save)
    found = resolve(options.load)  # once: a run that goes on there may have another latest step when it is verified
    to = convert(found.folder, options.save, to=options.to, dtype=options.dtype,
                 shard_bytes=int(options.shard_gb * 1e9), say=lambda line: print(line, flush=True), force=options.force)
    print(f"{options.save}: {'a Hugging Face folder' if to == 'hf' else 'a run folder'}, made in "
          f"{time.perf_counter() - start:.1f} s", flush=True)
    if options.verify:
        return 0 if verify(found.folder, options.save, options.dtype, lambda line: print(line, flush=True)) else 1
    return 0


if __name__ == "__main__":
    run_cli(main)
