"""Training steps a second beside plain transformers, in one run, interleaved.

27.4 M parameters (hidden 512, ffn 1376, 8 layers, 8 heads, 4 kv heads, vocabulary 4096, untied), sequence 256, 16
sequences a step in micro-batches of 4, AdamW with clipping. The bound is the time of the model's matrix products alone
(forward, both gradients, attention's included), measured in the same rounds. PP2 is as a run has it: a stage that waits
sleeps, and leaves its core to the other one (engine/train/threads.py). With one thread a stage nobody can use the core
of a stage that waits, so there 1F1B's bubble lowers the bound.

    python benchmarks/train_step.py [--rounds 5] [--steps 2] [--only NAME,...] [--save]
"""

from __future__ import annotations

import argparse
import os
import statistics
from datetime import timedelta
from typing import Any

from common import Contender, Stepper, fill, keep, median_ratio, race, table

TOKENS = 16 * 256
ONE_THREAD = "pp2, 1 thread"
SHAPE = ("--layers 8 --hidden 512 --ffn-hidden 1376 --heads 8 --kv-heads 4 --vocab-size 4096 --micro-batch 4 "
         "--global-batch 16 --seq-len 256 --steps 100000 --lr 1e-4")
LINEAR = {"qkv": (1024, 512, 8), "out": (512, 512, 8), "gate-up": (2752, 512, 8), "down": (512, 1376, 8),
          "head": (4096, 512, 1)}
"""outputs, inputs, how many of each matrix product."""


def build_triax(rank: int, world: int, flags: str) -> Stepper:
    """Our step on this rank."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from engine.config import check, parse
    from engine.data.batches import Batch
    from engine.mesh import build_mesh
    from engine.train.engine import DTYPES, Engine
    from engine.train.launch import tune_allocator

    tune_allocator()
    config = parse([*SHAPE.split(), *flags.split()])
    if world > 1:
        dist.init_process_group("gloo")
    mesh = build_mesh(check(config, world), rank, config.model.kv_heads, timedelta(seconds=120))
    engine = Engine(config, mesh, torch.device("cpu"), DTYPES[config.runtime.dtype])
    fill(engine)
    rows = np.random.default_rng(mesh.dp).integers(0, 4096, (16 // mesh.size("dp"), 257))
    batch = Batch(rows[:, :-1], rows[:, 1:])
    return lambda: void(engine.train_step(batch))


def build_transformers(rank: int, world: int, dtype: str) -> Stepper:
    """The same model and step in plain transformers with torch's fused AdamW: fp32, bf16 autocast or pure bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=False, attn_implementation="sdpa",
                         use_cache=False)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, 4096, (16, 256))

    def step() -> None:
        for part in ids.split(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                loss = model(input_ids=part, labels=part).loss / 4
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_bound(rank: int, world: int, dtype: str) -> Stepper:
    """The matrix products of a step and nothing else: what no engine can beat on this machine."""
    import torch
    import torch.nn.functional as F

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    jobs = []
    for outputs, inputs, count in LINEAR.values():
        x, w, g = (torch.randn(shape).to(kind) for shape in ((1024, inputs), (outputs, inputs), (1024, outputs)))
        jobs += [(lambda x=x, w=w: F.linear(x, w), count), (lambda g=g, w=w: g @ w, count),
                 (lambda g=g, x=x: g.t() @ x, count)]
    # Attention: 2 products forward, 4 backward, of which causality needs half the rows' length.
    q, k = torch.randn(32, 256, 64).to(kind), torch.randn(32, 64, 128).to(kind)
    jobs.append((lambda: torch.bmm(q, k), 8 * 6))

    def step() -> None:
        for _ in range(4):
            for job, count in jobs:
                for _ in range(count):
                    job()

    return step


def void(_: Any) -> None:
    """Drops a result."""


def staged() -> dict[str, str]:
    """The environment that a run of two stages gives itself on this machine."""
    from engine.train.threads import openmp

    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    return openmp(["--pp", "2", "--device", "cpu"], [], launched, len(os.sched_getaffinity(0)))


def share_of(bound: Contender, contender: Contender) -> float:
    """The bound's time over a contender's; a bubble that nobody can fill is taken out of the contender's."""
    idle = 1 / 5 if ONE_THREAD in contender.name else 0.0  # 1F1B with 2 stages and 4 micro-batches
    return 1 / median_ratio(bound, contender) / (1 - idle)


def contenders() -> list[Contender]:
    """Everyone who runs, in the order of the table."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [Contender(f"bound {dtype}", build_bound, options={"dtype": dtype}),
                  Contender(f"triax {dtype}", build_triax, options={"flags": f"--dtype {dtype}"}),
                  Contender(f"triax {dtype} tp2", build_triax, 2, {"flags": f"--dtype {dtype} --tp 2"}),
                  Contender(f"triax {dtype} pp2", build_triax, 2, {"flags": f"--dtype {dtype} --pp 2"}, staged()),
                  Contender(f"triax {dtype} {ONE_THREAD}", build_triax, 2, {"flags": f"--dtype {dtype} --pp 2"}),
                  Contender(f"triax {dtype} dp2", build_triax, 2, {"flags": f"--dtype {dtype}"})]
    found.append(Contender("transformers fp32", build_transformers, options={"dtype": "fp32"}))
    found.append(Contender("transformers bf16 autocast", build_transformers, options={"dtype": "autocast"}))
    found.append(Contender("transformers bf16 pure", build_transformers, options={"dtype": "bf16"}))
    return found


def main() -> None:
    """Runs the race and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", default="", help="names that must occur in a contender's name, comma separated")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train_step.json")
    args = parser.parse_args()
    words = [word for word in args.only.split(",") if word]
    runners = [c for c in contenders() if not words or any(word in c.name for word in words)]
    race(runners, args.rounds, args.steps)
    by_name = {c.name: c for c in runners}
    rows = [["", "tokens/s", "min", "max", "share of bound", "x transformers"]]
    results = {}
    for c in runners:
        rate = TOKENS / statistics.median(c.seconds)
        kind = "bf16" if "bf16" in c.name else "fp32"
        bound = by_name.get(f"bound {kind}")
        peer = by_name.get("transformers fp32" if kind == "fp32" else "transformers bf16 autocast")
        share = share_of(bound, c) if bound else None
        ratio = median_ratio(c, peer) if peer else None
        rows.append([c.name, f"{rate:,.0f}", f"{TOKENS / max(c.seconds):,.0f}", f"{TOKENS / min(c.seconds):,.0f}",
                     f"{share:.1%}" if share else "-", f"{ratio:.2f}" if ratio else "-"])
        results[c.name] = {"tokens_per_s": rate, "seconds": c.seconds, "share_of_bound": share,
                           "ratio_to_transformers": ratio}
    print(table(rows))
    if args.save:
        print(keep("train_step", {"rounds": args.rounds, "steps": args.steps, "results": results}))


if __name__ == "__main__":
    main()
