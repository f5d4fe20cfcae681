"""Checkpoints: logical tensors as safetensors slices and a manifest; saved by any layout, loaded by any other."""

from engine.checkpoint.dtypes import DTYPES, dtype_name
from engine.checkpoint.folders import Resolved, latest_step, resolve, step_folders
from engine.checkpoint.load import Checkpoint, open_checkpoint
from engine.checkpoint.save import alone, save_checkpoint
from engine.checkpoint.slices import KINDS
from engine.checkpoint.source import TensorSource, load_weights
from engine.parallel.sharding import Entry

__all__ = [
    "DTYPES",
    "KINDS",
    "Checkpoint",
    "Entry",
    "Resolved",
    "TensorSource",
    "alone",
    "dtype_name",
    "latest_step",
    "load_weights",
    "open_checkpoint",
    "resolve",
    "save_checkpoint",
    "step_folders",
]
