"""Instruction tuning: `torchrun [--nproc-per-node N] -m engine.finetune --load DIR --data ROWS.jsonl ...`.

The loss is on the answers only, averaged over the supervised tokens of the global batch; a row is a sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.config import RunConfig
from engine.data.chat import CHATML_TEMPLATE
from engine.data.fingerprint import Fingerprint, of_file
from engine.errors import UserError
from engine.mesh import Mesh
from engine.train.entry import enter
from engine.train.job import Job
from engine.train.request import EntryPoint
from engine.train.run import Feed
from engine.tune.batches import ChatBatches

DEFAULTS: Mapping[str, Any] = MappingProxyType({
    "lr": 2e-5, "warmup": 20, "decay": "cosine", "weight_decay": 0.0, "global_batch": 16, "micro_batch": 4,
    "seq_len": 512,
})
"""What tuning changes of the pretraining defaults."""


UNREAD: Mapping[str, str] = MappingProxyType({
    "verify_data": "files of rows have no checksums",
    "mask_documents": "a row is a sequence of its own here, and sees no other",
    "split": "tuning holds no part of --data back yet; give the held-back rows to --valid-data"})
"""Flags that mean nothing here."""


def main(argv: Sequence[str], recipe: Sequence[str] = (), demo: Sequence[str] = ()) -> int:
    """Runs one rank. `recipe` holds a recipe's own flags, `demo` its data for whoever brings none."""
    return enter(EntryPoint("engine.finetune", UNREAD, check_data, DEFAULTS), argv, recipe, demo, make_feed)


def check_data(config: RunConfig) -> Fingerprint:
    """What the run tunes on. Raises UserError unless there is a model to tune and rows to tune it on."""
    if not config.save.load and not config.save.resume:
        raise UserError("tuning starts from a trained model: give its folder (a run, a step or a Hugging Face folder) "
                        "with --load")
    if not config.data.data:
        raise UserError("--data is needed: a file of chat rows (.jsonl or .json); `make demo` makes one to try")
    for flag, path in (("data", config.data.data), ("valid-data", config.data.valid_data)):
        if path and not Path(path).is_file():
            raise UserError(f"--{flag} {path} is not a file")
    return of_file(config.data.data)


def make_feed(job: Job, mesh: Mesh, origin: int) -> Feed:
    """Rows in their seeded order for training, the first ones of --valid-data for evaluation."""
    config = job.config
    if job.tokenizer is None:
        raise UserError(f"{config.save.load} holds no tokenizer; give one with --tokenizer")
    train = ChatBatches(config.data.data, job.tokenizer, seq_len=config.batch.seq_len,
                        global_batch=config.batch.global_batch, dp_rank=mesh.dp, dp=mesh.size("dp"),
                        seed=config.runtime.seed, origin=origin)
    valid = None
    if config.data.valid_data and config.save.eval_samples:
        held = ChatBatches(config.data.valid_data, job.tokenizer, seq_len=config.batch.seq_len,
                           global_batch=1, seed=config.runtime.seed)
        valid = held.head(config.save.eval_samples)
    epochs = config.batch.steps * config.batch.global_batch / train.epoch_size
    return Feed(train, valid, f"{train.summary()}; {epochs:.2f} epochs in {config.batch.steps} steps",
                train.epoch_size, CHATML_TEMPLATE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
