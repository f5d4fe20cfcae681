"""Instruction tuning: `torchrun [--nproc-per-node N] -m engine.finetune --load DIR --data ROWS.jsonl ...`.

The loss is on the answers only, averaged over the supervised tokens of the global batch; a row is a sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.config import DataConfig, RunConfig
from engine.data.batches import Batch
from engine.data.chat import CHATML_TEMPLATE, ChatEncoder
from engine.data.fingerprint import Fingerprint, of_files
from engine.errors import UserError, shown
from engine.mesh import Mesh
from engine.train.entry import enter
from engine.train.job import Job
from engine.train.request import EntryPoint
from engine.train.run import Feed
from engine.tune.batches import ChatBatches, head
from engine.tune.encoded import Encoded, check_files, encode_files
from engine.tune.files import chat_files

DEFAULTS: Mapping[str, Any] = MappingProxyType({
    "lr": 2e-5, "warmup": 20, "decay": "cosine", "weight_decay": 0.0, "global_batch": 16, "micro_batch": 4,
    "seq_len": 512,
})
"""What tuning changes of the pretraining defaults."""


UNREAD: Mapping[str, str] = MappingProxyType({
    "verify_data": "files of rows have no checksums",
    "mask_documents": "a row is a sequence of its own here, and sees no other"})
"""Flags that mean nothing here."""


def main(argv: Sequence[str], recipe: Sequence[str] = (), demo: Sequence[str] = ()) -> int:
    """Runs one rank. `recipe` holds a recipe's own flags, `demo` its data for whoever brings none."""
    return enter(EntryPoint("engine.finetune", UNREAD, check_data, DEFAULTS, loads=True), argv, recipe, demo, make_feed)


def check_data(config: RunConfig) -> Fingerprint:
    """What the run tunes on. Raises UserError unless there is a model to tune and rows to tune it on."""
    if not config.save.load and not config.save.resume:
        raise UserError("tuning starts from a trained model: give its folder (a run, a step or a Hugging Face folder) "
                        "with --load")
    data = config.data
    if not data.data:
        raise UserError("--data is needed: files of chat rows (.jsonl, .json, .csv, .parquet), joined by commas; `make "
                        "demo` makes one to try")
    paths = chat_files(data.data)
    held = chat_files(data.valid_data, "--valid-data") if data.valid_data else []
    tallies = [check_files(files, config.batch.seq_len, ignored_keys(data))
               for files in (paths, held) if files]  # what cannot be read is known before any process group exists
    idle = sorted(ignored_keys(data).difference(*(tally.unused for tally in tallies)))
    if idle:
        raise UserError(f"--ignore-keys {shown(','.join(idle))}: no row holds anything under that name; leave it out")
    # Another share or another key left out makes other rows, as other files do: sample k would be another one.
    share = data.split
    split = 0.0 if held else share
    return [{**one, "split": split, "ignored keys": sorted(ignored_keys(data))} for one in of_files(paths)]


def ignored_keys(data: DataConfig) -> frozenset[str]:
    """The keys of rows that the user leaves out."""
    return frozenset(key for key in (name.strip() for name in data.ignore_keys.split(",")) if key)


def make_feed(job: Job, mesh: Mesh, origin: int) -> Feed:
    """Rows in their seeded order for training; for evaluation the first of --valid-data, or of what --split holds
    back."""
    config = job.config
    if job.tokenizer is None:
        raise UserError(f"{config.save.load} holds no tokenizer; give one with --tokenizer")
    encoder, ignored, data = ChatEncoder(job.tokenizer), ignored_keys(config.data), config.data
    rows, tally = encode_files(chat_files(data.data), encoder, config.batch.seq_len, ignored)
    held = None
    if data.valid_data:
        held = encode_files(chat_files(data.valid_data, "--valid-data"), encoder, config.batch.seq_len, ignored)[0]
    elif data.split:
        rows, held = rows.split(data.split)
    batches = ChatBatches(rows, global_batch=config.batch.global_batch, dp_rank=mesh.dp, dp=mesh.size("dp"),
                          seed=config.runtime.seed, origin=origin)
    valid = head(held, config.save.eval_samples) if held is not None and config.save.eval_samples else None
    epochs = config.batch.steps * config.batch.global_batch / len(rows)
    summary = (f"{tally.summary()}; {rows.tokens:,} tokens, {rows.supervised:,} of them learned "
               f"({rows.supervised / rows.tokens:.1%}); {epochs:.2f} epochs in {config.batch.steps} steps; "
               f"{_held_back(held, rows, valid, config)}")
    return Feed(batches, valid, summary, len(rows), CHATML_TEMPLATE)


def _held_back(held: Encoded | None, rows: Encoded, valid: Batch | None, config: RunConfig) -> str:
    """What is evaluated, in words."""
    if held is None:
        unheard = f", so --eval-every {config.save.eval_every} evaluates nothing" if config.save.eval_every else ""
        return f"nothing held back{unheard} (--split 0.1 or --valid-data holds rows back)"
    read = 0 if valid is None else len(valid.tokens)
    source = "of --valid-data" if config.data.valid_data else "of --data"
    both = int(np.isin(held.digests, rows.digests).sum())
    known = f"; {both:,} of them are learned from too: their loss says nothing of new rows" if both else ""
    return f"held back: {len(held):,} rows {source}, {read:,} read in an evaluation{known}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
