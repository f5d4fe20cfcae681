"""The loop: read, step, record, call back. Everything extra is a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.comm.heart import Phase
from engine.data.batches import Batches
from engine.data.prefetch import Prefetch
from engine.plan import flops_of
from engine.train.callbacks import Callback, StepRecord, peak_memory
from engine.train.engine import Engine, StepResult
from engine.train.launch import Diverged
from engine.train.signals import StopRequest


def train(engine: Engine, batches: Batches, callbacks: Sequence[Callback], mfu: Callable[[float], float | None],
          stop: StopRequest) -> bool:
    """Trains from `engine.step` to the last step; returns False when a signal ended the run early.

    `mfu` turns FLOP/s into the share of the machine's peak. A step whose loss or gradient norm is not finite moves no
    weight, and the last of so many of them in a row as --skip-nonfinite allows raises Diverged.
    """
    config, heart = engine.config.batch, engine.mesh.heart
    in_a_row, limit = 0, max(1, engine.config.optimizer.skip_nonfinite)
    final = min(config.steps, config.stop_after or config.steps)
    stop.begin()
    with Prefetch(batches, engine.step, final) as reader:
        while engine.step < final:
            heart.enter(Phase.DATA, engine.step + 1)
            start = time.perf_counter()
            batch = reader.step(engine.step)
            waited = time.perf_counter() - start
            result = engine.train_step(batch, stop.asked)
            in_a_row = 0 if result.finite else in_a_row + 1
            if in_a_row == limit:
                steps = f" in {limit} steps (--skip-nonfinite {limit})" if limit > 1 else ""
                raise Diverged(f"step {engine.step}: loss {result.loss}, gradient norm {result.grad_norm}; no weight "
                               f"has moved{steps}. Lower --lr, lengthen --warmup, or look at the data of this step")
            record = _record(engine, result, time.perf_counter() - start, waited, mfu)
            for callback in callbacks:
                heart.enter(Phase.CALLBACK)  # one that saves or evaluates says so itself
                callback.after_step(record, record.stopped or engine.step == final)
            if record.stopped:
                return engine.step == final
    return True


def _record(engine: Engine, result: StepResult, seconds: float, waited: float,
            mfu: Callable[[float], float | None]) -> StepRecord:
    flops = flops_of(engine.config.model, result.tokens, result.squares)
    return StepRecord(step=engine.step, loss=result.loss, lr=result.lr, grad_norm=result.grad_norm,
                      tokens=result.tokens, supervised=result.supervised, tokens_per_s=result.tokens / seconds,
                      mfu=mfu(flops / seconds), step_s=seconds, data_s=waited, memory=peak_memory(engine.device),
                      crc=result.crc, stopped=result.stop, skipped=not result.finite)
