"""Trains a vocabulary: python tools/train_tokenizer.py --input F... --vocab-size 32000 --output DIR"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.quiet import end_quietly  # noqa: E402

if __name__ == "__main__":
    end_quietly()  # before the imports, which take seconds

from engine.config.command import Command, given_text, whole  # noqa: E402
from engine.data.inputs import SPLITS, find_sources, lost_whole  # noqa: E402
from engine.errors import UserError, run_cli  # noqa: E402
from engine.tokenizer.sample import DEFAULT_SEED, SAMPLE_BYTES, Sample, SampleSettings, draw_sample  # noqa: E402
from engine.tokenizer.train import MODELS, SPECIAL, TrainReport, check_request, train  # noqa: E402
from engine.tokenizer.train_output import ABOUT, check_output  # noqa: E402

_LEAST_SHARE = 1e-4  # of the characters; scripts below it are not printed


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Command(
        "train_tokenizer.py",
        "Train a sentencepiece vocabulary, written also as tokenizer.json, on a sample of JSONL, JSON "
        "arrays, plain text, parquet and MediaWiki dumps, each also as .gz, .bz2, .xz or .zst.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="F", dest="inputs",
                        help="files, folders, patterns")
    parser.add_argument("--vocab-size", type=whole(), required=True)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--model", choices=MODELS, default="bpe")
    parser.add_argument("--special", type=given_text, default=",".join(SPECIAL),
                        help="control pieces, separated by commas; '' for none")
    parser.add_argument("--json-key", default="text", help="where the text is, in JSON and parquet")
    parser.add_argument("--split-text", choices=SPLITS, default="document", help="what a document is in plain text")
    parser.add_argument("--encoding", default="utf-8", help="of text without a byte-order mark")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad record")
    parser.add_argument("--sample-megabytes", type=whole(-1 << 40, 1 << 40), default=SAMPLE_BYTES >> 20, metavar="N",
                        help="text to train on, drawn from all that is read")
    parser.add_argument("--read-megabytes", type=whole(-1 << 40, 1 << 40), metavar="N",
                        help="read about this much of the input, in parts drawn from all of it")
    parser.add_argument("--seed", type=whole(-1 << 70, 1 << 70), default=DEFAULT_SEED,
                        help=f"of what is drawn ({DEFAULT_SEED})")
    parser.add_argument("--overwrite", action="store_true")
    return parser.read(argv)


def _sampled(sample: Sample, seed: int) -> str:
    read = sample.read
    pages = f"; pages that are no articles: {sum(read.left_out.values()):,}" if read.left_out else ""
    part = "all of it" if sample.size == read.text_bytes else f"seed {seed}"
    return (
        f"read {read.documents:,} documents, {read.text_bytes / 1e6:,.1f} MB of text; left out: {read.empty:,} empty, "
        f"{read.skipped:,} bad{pages}; sampled {len(sample.documents):,} documents, {sample.size / 1e6:,.1f} MB "
        f"({part})"
    )


def _learned(output: str, report: TrainReport) -> Iterator[str]:
    figures = report.figures
    yield (
        f"{output}: {report.vocab_size} pieces; {report.covered:.4%} of characters have a piece of their own, the rest "
        f"is spelled in bytes; {report.bytes_per_token:.3f} bytes per token and {figures.tokens_per_word:.2f} tokens "
        f"per word on {figures.bytes / 1e6:.1f} MB of the sample"
    )
    yield f"{'':15}{'characters':>12}{'covered':>10}{'bytes/token':>13}{'characters/token':>18}"
    characters = sum(one.characters for one in figures.scripts)
    shown = [one for one in figures.scripts if one.characters >= _LEAST_SHARE * characters]
    for one in shown:
        share = one.characters / characters
        yield (f"{one.script.replace('_', ' '):15}{share:12.2%}{one.covered:10.2%}{one.bytes_per_token:13.2f}"
               f"{one.characters_per_token:18.2f}")  # fmt: skip
    if hidden := figures.scripts[len(shown):]:
        yield f"{len(hidden)} rarer scripts are in {ABOUT}"
    if report.replaced:
        yield f"{report.replaced:,} characters U+2585 or NUL were read as spaces: the trainer cannot take them"
    if report.spelled:
        yield f"{report.spelled:,} control pieces or byte names spelled out in the text were not learned from"
    yield _equality(report)


def _equality(report: TrainReport) -> str:
    if report.compared is None:
        return "tokenizer.json was not compared with tokenizer.model: pip install tokenizers"
    if not report.differing:
        return f"tokenizer.json gives the ids of tokenizer.model on all of {report.compared:,} documents compared"
    what = f"gives other ids than tokenizer.model on {report.differing:,} of {report.compared:,} documents compared"
    if report.json_written:
        return f"tokenizer.json {what}, where two splits are within a rounding of float32"
    return f"tokenizer.json is not written: it {what}"


def _about(args: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """What training.json tells of the input."""
    read = sample.read
    return {
        "sampling": {key: args[key] for key in ("seed", "sample_megabytes", "read_megabytes", "json_key", "split_text",
                                                "encoding", "on_error")},
        "inputs": [{"path": source.path, "bytes": source.size} for source in sample.sources],
        "read": {"bytes": read.input_bytes, "documents": read.documents, "text_bytes": read.text_bytes,
                 "empty": read.empty, "skipped": read.skipped, "pages_left_out": dict(sorted(read.left_out.items()))},
    }  # fmt: skip


def _run(args: dict[str, Any]) -> int:
    output, special = Path(args["output"]), [piece for piece in args["special"].split(",") if args["special"]]
    check_request(args["vocab_size"], args["model"], special)
    reading = ("inputs", "json_key", "split_text", "encoding", "on_error", "seed")
    settings = SampleSettings(
        **{name: args[name] for name in reading},
        sample_bytes=args["sample_megabytes"] << 20,
        read_bytes=None if args["read_megabytes"] is None else args["read_megabytes"] << 20,
    )
    sources = find_sources(settings.inputs, settings.encoding)
    check_output(output, overwrite=args["overwrite"], inputs=[source.path for source in sources])
    print(f"{len(sources):,} input files, {sum(source.size for source in sources) / 1e6:,.1f} MB", flush=True)
    sample = draw_sample(settings)
    for fault in sample.read.faults:
        print(f"skipped {fault}", file=sys.stderr)
    print(_sampled(sample, args["seed"]), flush=True)
    print(f"training a {args['model']} vocabulary of {args['vocab_size']:,} pieces", flush=True)
    report = train(
        sample.texts, output, vocab_size=args["vocab_size"], model=args["model"], special=special,
        about=_about(args, sample), say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    for line in _learned(args["output"], report):
        print(line)
    if sample.read.lost:
        print(f"error: {lost_whole(sample.read.lost)}; the vocabulary is learned from the others", file=sys.stderr)
    return 1 if sample.read.lost else 0


def main(argv: list[str]) -> int:
    """Parses, trains, prints what was learned."""
    try:
        return _run(vars(_arguments(argv)))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is written", file=sys.stderr, flush=True)
        os._exit(130)  # sentencepiece's thread cannot be stopped, and must not run while the process is taken down
    except MemoryError:
        raise UserError("not enough memory; use a smaller --sample-megabytes") from None


if __name__ == "__main__":
    run_cli(main)
