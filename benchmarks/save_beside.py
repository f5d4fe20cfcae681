"""How long a checkpoint holds training up: written beside it, waited for, and by torch's async_save; interleaved.

27.4 M parameters (the shape of train_step.py) in fp32, 4,096 tokens a step, one process; the state is 329 MB. A turn is
some steps with one save after the first, and ends when the checkpoint is on the disk. What a turn takes beyond the same
steps without a save is what the save costs in all, also by taking cores from the steps beside it; `stood still` is the
part in which training waited. The peer is torch.distributed.checkpoint.async_save of the same tensors.

    python benchmarks/save_beside.py [--rounds 5] [--steps 4] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Contender, Stepper, keep, race, table
from train_step import SHAPE, TOKENS

NOTHING, BESIDE, WAITS, TORCH = "no save", "triax, beside training", "triax --save-wait", "torch async_save"
HOW = (NOTHING, BESIDE, WAITS, TORCH)


def build(rank: int, world: int, how: str, steps: int, folder: str) -> Stepper:
    """A turn of `steps` steps with one save of a kind; the seconds that training stood still go into a file."""
    import numpy as np
    import torch

    from engine.checkpoint import alone, save_checkpoint
    from engine.checkpoint.background import BackgroundSave
    from engine.config import Layout, parse, to_dict
    from engine.data.batches import Batch
    from engine.mesh import AXES, Mesh
    from engine.train.engine import Engine
    from engine.train.launch import tune_allocator

    tune_allocator()
    config = parse([*SHAPE.split(), "--dtype", "fp32"])
    engine = Engine(config, Mesh(Layout(), 0, dict.fromkeys(AXES, 0)), torch.device("cpu"), torch.float32)
    engine.initialize()
    rows = np.random.default_rng(0).integers(0, 4096, (16, 257))
    batch = Batch(rows[:, :-1], rows[:, 1:])
    meta: dict[str, Any] = {"samples": 0, "config": to_dict(config), "world": {}}
    root = Path(folder) / how.replace(" ", "-")
    root.mkdir(exist_ok=True)
    still: list[float] = []
    saver = BackgroundSave(root / "checkpoints", rank=0, world=1, agree=alone, device=torch.device("cpu"),
                           told=lambda saved: still.append(saved.waited))
    if how == BESIDE:
        engine.rider = saver
    if how == TORCH:
        import torch.distributed as dist

        dist.init_process_group("gloo")

    def begin() -> Callable[[], object]:
        """Saves, or begins to; returns what waits for the end."""
        start = time.perf_counter()
        if how == BESIDE:
            saver.save(engine.step, engine.optimizer.entries(), meta=meta, assets={}, keep=1)
            return saver.finish
        if how == WAITS:
            save_checkpoint(root / "checkpoints", engine.step, engine.optimizer.entries(), rank=0, world=1,
                            agree=alone, meta=meta, assets={}, keep=1)
            still.append(time.perf_counter() - start)
        if how == TORCH:
            import torch.distributed.checkpoint as dcp

            state = {f"{entry.kind}.{entry.name}": entry.tensor for entry in engine.optimizer.entries()}
            found = dcp.async_save(state, checkpoint_id=str(root / f"step-{engine.step}"))
            still.append(time.perf_counter() - start)
            return found.result
        return lambda: None

    def turn() -> None:
        engine.train_step(batch)
        wait = begin()
        for _ in range(steps - 1):
            engine.train_step(batch)
        wait()
        (root / "still").write_text(str(still[-1] if still else 0.0))

    return turn


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/save_beside.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [Contender(how, build, options={"how": how, "steps": args.steps, "folder": folder}) for how in HOW]
        still: dict[str, list[float]] = {how: [] for how in HOW}

        def say(line: str) -> None:
            print(line, flush=True)
            if "round" in line:
                for how in HOW:
                    still[how].append(float((Path(folder) / how.replace(" ", "-") / "still").read_text()))

        race(found, args.rounds, 1, say)
        report(found, still, args.steps, args.save)


def report(found: list[Contender], still: dict[str, list[float]], steps: int, save: bool) -> None:
    """Medians over the rounds, in seconds and in shares of a step of 4,096 tokens."""
    step = statistics.median(found[0].seconds) / steps
    rows = [[f"{TOKENS} tokens a step, {step:.2f} s", "turn s", "stood still s", "of a step", "in all, of a step"]]
    results: dict[str, Any] = {"step_s": step}
    for contender in found:
        waited = statistics.median(still[contender.name])
        cost = statistics.median((a - b) / step for a, b in zip(contender.seconds, found[0].seconds, strict=True))
        rows.append([contender.name, f"{statistics.median(contender.seconds):.2f}", f"{waited:.3f}",
                     f"{waited / step:.1%}", f"{cost:.0%}"])
        results[contender.name] = {"seconds": contender.seconds, "still_s": still[contender.name]}
    print(table(rows))
    if save:
        print(keep("save_beside", {"steps": steps, "results": results}))


if __name__ == "__main__":
    main()
