"""The Hugging Face side: configs, tensor names and serving folders, a short file for each model family."""

from engine.hf.assets import assets_for
from engine.hf.config import TokenIds, config_from_hf, config_to_hf, read_config, token_ids
from engine.hf.folder import HFSource, open_hf

__all__ = [
    "HFSource",
    "TokenIds",
    "assets_for",
    "config_from_hf",
    "config_to_hf",
    "open_hf",
    "read_config",
    "token_ids",
]
