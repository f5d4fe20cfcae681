"""A small chain to be attacked (corpus, vocabulary, a pretrained and a tuned run), made by one process that writes down
which fields of the config each entry point read on its way.  python chain.py FOLDER"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from engine.config import schema

MODEL = ("--layers 2 --hidden 32 --ffn-hidden 64 --heads 4 --kv-heads 2 --vocab-size 640 --seq-len 32 --global-batch 4 "
         "--micro-batch 2 --lr 1e-3 --warmup 1 --log-every 1").split()
NOT_READING = ("/engine/config/", "/engine/plan/", "/engine/hf/", "/dataclasses.py", "<string>")
"""Code that looks at every field: rules, the plan, config.json, and Python's own. To be read is more."""


def watch(reads: set[str]) -> None:
    """From now on `reads` collects the names of fields that code which computes something has looked at."""
    def get(self: object, name: str) -> object:
        code = sys._getframe(1).f_code
        if code.co_name == "plan_layout" or not any(part in code.co_filename for part in NOT_READING):
            reads.add(name)
        return object.__getattribute__(self, name)

    for name in ("Model", "Parallel", "Batch", "Optimizer", "Data", "Save", "Runtime"):
        getattr(schema, f"{name}Config").__getattribute__ = get


def make(folder: Path) -> dict[str, list[str]]:
    """Makes the chain and returns the fields that each entry point read."""
    import numpy as np

    from engine import finetune, pretrain, verify
    from engine.data.indexed import IndexedWriter
    from engine.tokenizer.train import train

    train(lambda: [Path(argparse.__file__).read_text("utf-8")], folder / "tokenizer", vocab_size=600)
    with IndexedWriter(folder / "corpus", 600) as writer:
        for row in np.random.default_rng(0).integers(0, 600, (40, 50)):
            writer.add_document(row)
        writer.finish()
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reads: set[str] = set()
    watch(reads)
    found: dict[str, list[str]] = {}

    def run(entry: str, main: Callable[[list[str]], int], *argv: str) -> None:
        reads.clear()
        assert main(list(argv)) == 0, argv
        found[entry] = sorted({*found.get(entry, []), *reads})

    paths = {name: str(folder / name) for name in ("corpus", "tokenizer", "rows.jsonl", "run", "tuned")}
    run("engine.pretrain", pretrain.main, *MODEL, "--data", paths["corpus"], "--split", "0.2", "--epochs", "0.2",
        "--tokenizer", paths["tokenizer"], "--out", paths["run"], "--eval-every", "1")
    run("engine.pretrain", pretrain.main, "--resume", "--out", paths["run"], "--steps", "4")
    run("engine.finetune", finetune.main, "--load", paths["run"], "--data", paths["rows.jsonl"], "--valid-data",
        paths["rows.jsonl"], "--epochs", "1", "--seq-len", "32", "--warmup", "0", "--out", paths["tuned"],
        "--eval-every", "1")
    run("engine.finetune", finetune.main, "--resume", "--out", paths["tuned"])
    run("engine.verify", verify.main, "--steps", "2", "--warmup", "0")
    return found


if __name__ == "__main__":
    made = Path(sys.argv[1])
    (made / "reads.json").write_text(json.dumps(make(made)))
