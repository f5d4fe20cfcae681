"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from engine.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up to --lr, then cosine, linear or no decay."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    if config.decay == "constant":
        return config.lr
    if config.decay == "linear":
        return config.lr + (low - config.lr) * progress
    return low + (config.lr - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
