"""Pretraining: `torchrun [--nproc-per-node N] -m engine.pretrain --data PREFIX ...`, or one of examples/*.sh."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from engine.config import RunConfig
from engine.data import open_samples
from engine.data.batches import PretrainBatches, read
from engine.data.fingerprint import Fingerprint, copies, of_corpora
from engine.data.indexed import bare_prefix
from engine.data.samples import Samples
from engine.errors import UserError
from engine.mesh import Mesh
from engine.train.entry import enter
from engine.train.job import Job
from engine.train.launch import place_from_environment
from engine.train.prove_data import prove_data
from engine.train.request import EntryPoint
from engine.train.run import Feed

_CPU = torch.device("cpu")
UNREAD: Mapping[str, str] = MappingProxyType({
    "ignore_keys": "a corpus is token ids, and has no keys",
    "chat_template": "pretraining has no turns; engine.finetune learns a template"})
"""Flags that mean nothing here."""


def main(argv: Sequence[str], recipe: Sequence[str] = (), demo: Sequence[str] = ()) -> int:
    """Runs one rank. `recipe` holds a recipe's own flags, `demo` its data for whoever brings none."""
    return enter(EntryPoint("engine.pretrain", UNREAD, check_data), argv, recipe, demo, make_feed)


def check_data(config: RunConfig) -> Fingerprint:
    """What the run trains on. Raises UserError unless the datasets open and hold at least one sample."""
    data = config.data.data
    if not data:
        raise UserError("--data is needed: the prefix of a dataset that tools/preprocess_data.py has written; "
                        "`make demo` makes one to try")
    if os.path.isfile(data) and not data.endswith((".bin", ".idx")):
        raise UserError(f"--data {data} is a file of text, not the prefix of a dataset; make one of it: python "
                        f"tools/preprocess_data.py --input {data} --tokenizer T --output-prefix P, and give --data P")
    if not {":", ","} & set(data) and not Path(f"{bare_prefix(data)}.idx").exists():
        raise UserError(f"no dataset at {data}.idx; tools/preprocess_data.py writes one from text, and `make demo` "
                        "makes the demo corpus")
    _open(config, "train")
    _open(config, "valid")
    if place_from_environment().world == 1:
        _prove(config, None)  # nothing is written yet; several ranks do it when they can tell each other
    return of_corpora(data)


def make_feed(job: Job, mesh: Mesh, origin: int) -> Feed:
    """Samples of the corpus for training, the first ones of the held-back part for evaluation."""
    config = job.config
    if place_from_environment().world > 1:
        _prove(config, mesh, job.device)
    samples = _open(config, "train")
    assert samples is not None
    batches = PretrainBatches(samples, config.batch.global_batch, mesh.dp, mesh.size("dp"), origin,
                              config.data.mask_documents)
    held = _open(config, "valid")
    valid = None
    if held is not None and config.save.eval_samples:
        valid = read(held, 0, min(config.save.eval_samples, held.epoch_size), config.data.mask_documents)
    epochs = config.batch.steps * config.batch.global_batch / samples.epoch_size
    kept = f"held back: {held.tokens:,} tokens" if held else "nothing held back"
    if config.data.valid_data and _overlap(config):
        kept += " of a corpus that is trained on too: their loss says nothing of new text"
    summary = (f"data: {samples.tokens:,} tokens, {samples.epoch_size:,} samples an epoch, {epochs:.2f} epochs in "
               f"{config.batch.steps} steps; {kept}"
               f"{'; attention within documents' if config.data.mask_documents else ''}")
    return Feed(batches, valid, summary, samples.epoch_size)


def _overlap(config: RunConfig) -> bool:
    """Whether --valid-data and --data have a corpus in common, or a copy of one, whatever the paths to it."""
    trained, held = (of_corpora(spec) for spec in (config.data.data, config.data.valid_data))
    return any(copy >= len(trained) for _, copy in copies([*trained, *held]))


def _prove(config: RunConfig, mesh: Mesh | None, device: torch.device = _CPU) -> None:
    """--verify-data: raises UserError unless the corpora hold the bytes that were written."""
    if not config.data.verify_data:
        return
    place = place_from_environment()
    prove_data([spec for spec in (config.data.data, config.data.valid_data) if spec], reads=place.local_rank == 0,
               world=mesh.group("world") if mesh else None, device=device,
               say=lambda line: print(line, flush=True) if place.rank == 0 else None)


def _open(config: RunConfig, part: str) -> Samples | None:
    """The samples of a part; None where nothing is held back."""
    data = config.data
    spec, fraction = data.data, data.split
    if part == "valid":
        if not data.valid_data and not data.split:
            return None
        if data.valid_data:
            spec, part, fraction = data.valid_data, "train", 0.0
    elif data.valid_data:
        fraction = 0.0
    return open_samples(spec, seq_len=config.batch.seq_len, seed=config.runtime.seed, part=part,
                        valid_fraction=fraction, vocab_size=config.model.vocab_size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
