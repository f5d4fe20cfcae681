"""The Hugging Face side: configs, tensor names and serving folders, a short file for each model family."""

from engine.hf.assets import assets_for
from engine.hf.config import config_from_hf, config_to_hf, read_config
from engine.hf.folder import HFSource, open_hf
from engine.hf.serving import Origin, TokenIds, read_origin, read_token_ids, token_ids

__all__ = [
    "HFSource",
    "Origin",
    "TokenIds",
    "assets_for",
    "config_from_hf",
    "config_to_hf",
    "open_hf",
    "read_config",
    "read_origin",
    "read_token_ids",
    "token_ids",
]
