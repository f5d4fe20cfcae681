"""From the command to the end of the first step, on one process, beside plain transformers; interleaved.

27.4 M parameters (the shape of train_step.py), a small dataset that is made here. Each turn starts a fresh process; the
parent's clock runs from before its start. Phases: the interpreter and the imports; everything between them and the
weights (config, checks, plan; for transformers its config); the weights (for transformers with the imports that they
set off); the first step (with data and report before it). Files are in the page cache: a first turn of each is not
counted.

    python benchmarks/startup.py [--rounds 5] [--patience S] [--save]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, Quiet, keep, table
from train_step import SHAPE

PHASES = ("imports", "prepare", "weights", "first step")
Marks = dict[str, float]


def triax(folder: Path) -> Marks:
    """This process becomes `python -m engine.pretrain`, with a clock at the seams; returns when they were passed."""
    from engine import pretrain
    from engine.train import callbacks, engine

    marks = {"imports": time.time()}

    class Timed(engine.Engine):
        def initialize(self) -> None:
            marks["prepare"] = time.time()
            super().initialize()
            marks["weights"] = time.time()

    class Console(callbacks.Console):
        def after_step(self, record: Any, last: bool) -> None:
            marks.setdefault("first step", time.time())
            super().after_step(record, last)

    from engine.train import run

    run.Engine, run.Console = Timed, Console  # type: ignore[misc]
    flags = [*SHAPE.split(), "--stop-after", "1", "--data", str(folder / "corpus")]
    if pretrain.main(flags) != 0:
        raise SystemExit("engine.pretrain failed")
    return marks


def transformers(folder: Path) -> Marks:
    """The same model and step, written by hand on transformers and torch's fused AdamW."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    marks = {"imports": time.time()}
    config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=False, attn_implementation="sdpa",
                         use_cache=False)
    tokens = np.memmap(folder / "corpus.bin", np.uint16, "r")[: 16 * 256].astype(np.int64)
    marks["prepare"] = time.time()
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    marks["weights"] = time.time()
    for part in torch.from_numpy(tokens).view(16, 256).split(4):
        (model(input_ids=part, labels=part).loss / 4).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    marks["first step"] = time.time()
    return marks


def bare(folder: Path) -> Marks:
    """`import torch` and nothing else: what no user of torch can go below."""
    import torch  # noqa: F401

    return {"imports": time.time()}


CONTENDERS = {"triax": triax, "transformers": transformers, "import torch": bare}


def turn(name: str, folder: Path) -> Marks:
    """Seconds of each phase in a fresh process, and of all of them."""
    start = time.time()
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    marks = json.loads(done.stdout.splitlines()[-1])
    ends = [start, *(marks[phase] for phase in PHASES if phase in marks)]
    found = {phase: b - a for phase, a, b in zip(PHASES, ends, ends[1:], strict=False)}
    return {**found, "total": ends[-1] - start}


def make_corpus(folder: Path) -> None:
    """A corpus of random tokens, large enough for a step."""
    import numpy as np

    from engine.data.indexed import IndexedWriter

    rng = np.random.default_rng(0)
    with IndexedWriter(folder / "corpus", 4096) as writer:
        for _ in range(100):
            writer.add_document(rng.integers(0, 4096, 1000))
        writer.finish()


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds spent on repeating turns with neighbours")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/startup.json")
    parser.add_argument("--child", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CONTENDERS[args.child](args.folder)))
        return
    quiet = Quiet(args.patience)
    turns: dict[str, list[Marks]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder)
        for number in range(args.rounds + 1):
            for contender in CONTENDERS:
                if number:
                    turns[contender].append(quiet.turn(partial(turn, contender, folder)))
                else:
                    turn(contender, folder)
            if number:
                print(f"  round {number}/{args.rounds}: "
                      + ", ".join(f"{c} {t[-1]['total']:.2f} s" for c, t in turns.items()), flush=True)
    report(turns, quiet, args.save)


def report(turns: dict[str, list[Marks]], quiet: Quiet, save: bool) -> None:
    """Medians over the rounds: seconds of each phase, and each contender's time over ours in the same round."""
    columns = (*PHASES, "total")
    rows = [["seconds", *columns, "min", "max", "x triax"]]
    results = {}
    for name, seconds in turns.items():
        medians = {c: statistics.median(s[c] for s in seconds) for c in columns if c in seconds[0]}
        totals = [s["total"] for s in seconds]
        ratio = statistics.median(t / ours["total"] for t, ours in zip(totals, turns["triax"], strict=True))
        rows.append([name, *(f"{medians[c]:.2f}" if c in medians else "-" for c in columns), f"{min(totals):.2f}",
                     f"{max(totals):.2f}", f"{ratio:.2f}"])
        results[name] = {"median_seconds": medians, "totals": totals, "ratio_to_triax": ratio}
    print(table(rows))
    print(quiet)
    if save:
        print(keep("startup", {"others": quiet.shares, "results": results}))


if __name__ == "__main__":
    main()
