"""What a run is: frozen dataclasses, read from YAML and flags, and the rules that join them."""

from engine.config.check import Layout, check, plan_layout
from engine.config.flags import describe, parse, to_dict, to_yaml
from engine.config.presets import PRESETS, resolve_model
from engine.config.schema import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    SaveConfig,
)

__all__ = [
    "PRESETS",
    "BatchConfig",
    "DataConfig",
    "Layout",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "RuntimeConfig",
    "SaveConfig",
    "check",
    "describe",
    "parse",
    "plan_layout",
    "resolve_model",
    "to_dict",
    "to_yaml",
]
