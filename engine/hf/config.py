"""config.json both ways: which family it is, what the network is, and the special tokens' ids."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.checkpoint.strict_json import read_object
from engine.config import ModelConfig
from engine.errors import UserError, shown
from engine.hf import gpt2, llama
from engine.hf.family import Family
from engine.hf.keys import Keys
from engine.hf.serving import TokenIds
from engine.hf.unsupported import UNSUPPORTED
from engine.model.shapes import logical_shapes

FAMILIES: Mapping[str, Family] = MappingProxyType({"llama": llama.FAMILY, "gpt2": gpt2.FAMILY})
"""By ModelConfig.family."""
HF_DTYPES: Mapping[str, str] = MappingProxyType(
    {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"})
"""Our words for number formats -> those of config.json."""
MAX_PARAMETERS = 1 << 44
"""A config that asks for more is damaged or hostile."""


LONGEST_NAME = 60
"""Characters of a model's name in reports."""


def config_to_hf(config: ModelConfig, ids: TokenIds, dtype: str = "fp32") -> dict[str, Any]:
    """The content of config.json; UserError for a network that no Hugging Face class computes, and for a field of it
    that does not come back from there as it went: no setting of a model is lost on export."""
    word, family = HF_DTYPES[dtype], FAMILIES[config.family]
    network = family.to_hf(config)
    back = family.from_hf(Keys(network, "the model's config.json"))
    kept = [name for name in vars(config) if name != "model" and name not in family.unused]
    lost = next((name for name in kept if getattr(back, name) != getattr(config, name)), None)
    if lost is not None:
        raise UserError(f"Hugging Face's {network['model_type']} has no place for {lost.replace('_', '-')} "
                        f"{getattr(config, lost)}: its config.json would say {getattr(back, lost)}")
    return {**network, "dtype": word, "torch_dtype": word, "bos_token_id": ids.bos,
            "eos_token_id": ids.eos[0] if ids.eos else None, "pad_token_id": ids.pad}


def config_from_hf(content: Mapping[str, Any], place: str = "config.json") -> ModelConfig:
    """The network that a config.json describes; UserError, by key, for all we do not compute and for nonsense."""
    keys = Keys(content, place)
    family = family_of(keys)
    if keys.content.get("auto_map") is not None:
        raise UserError(f"{place}: auto_map asks for code that comes with the model, which is never run")
    if keys.content.get("quantization_config") is not None:
        raise UserError(f"{place}: quantization_config: quantised weights are not read; dequantise the model first")
    config = family.from_hf(keys)
    one_layer = logical_shapes(replace(config, layers=1))
    total = config.layers * sum(math.prod(shape) for shape in one_layer.values())  # an upper bound
    if total > MAX_PARAMETERS:
        raise UserError(f"{place} describes {total:.1e} parameters, beyond any model; it is damaged")
    return config


def family_of(keys: Keys) -> Family:
    """The family of a config.json by its model_type."""
    kind = keys.get("model_type")
    kind = kind if isinstance(kind, str) else repr(kind)
    known = [word for family in FAMILIES.values() for word in family.model_types]
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family
    # Never "did you mean": the name of a network that looks alike is that of another network.
    word = shown(kind, 40)
    if kind in UNSUPPORTED:
        why = f" (it has {UNSUPPORTED[kind]})" if UNSUPPORTED[kind] else ""
        what = f"the model family {word} is known, but not supported{why}"
    else:
        what = f"the model_type '{word}' is not supported"
    raise UserError(f"{keys.place}: {what}; Triax computes {', '.join(known)}")


def read_config(folder: Path) -> ModelConfig:
    """The network of a Hugging Face folder, under the folder's name."""
    path = Path(folder) / "config.json"
    return replace(config_from_hf(read_object(path), str(path)), model=model_name(folder))


def model_name(folder: Path) -> str:
    """What its user calls the model in a folder: the folder's name; in the hub's cache, that of the repository.
    config.json's own `_name_or_path` is a path on another machine as often as not."""
    path = Path(os.path.abspath(folder))
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return shown("/".join(path.parent.parent.name.split("--")[1:]), LONGEST_NAME)
    return shown(path.name, LONGEST_NAME) or "model"
