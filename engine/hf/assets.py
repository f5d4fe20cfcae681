"""The files of a serving folder beside its weights: config, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.strict_json import parse_object, read_object
from engine.config import ModelConfig
from engine.data.chat import CHATML_TEMPLATE, END, START
from engine.hf.config import config_to_hf
from engine.hf.serving import CONFIG, GENERATION, TEMPLATE, TOKENIZER_CONFIG, Origin, generation_config, token_ids
from engine.tokenizer import Tokenizer

COPIED = ("tokenizer.json", "tokenizer.model", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "merges.txt", TEMPLATE)
"""What a Hugging Face folder may hold of a tokenizer; copied byte for byte."""


def assets_for(config: ModelConfig, tokenizer: Tokenizer | None, dtype: str = "fp32",
               template: str | None = None, origin: Origin | None = None) -> Mapping[str, Path | bytes]:
    """File name -> path or content of all that a serving folder needs beside the weights.

    `origin` is what the folder of a loaded model said of serving it; that is kept, and the tokenizer's ids are added.
    `template` is the chat template the model was tuned with; it takes the place of the tokenizer's own. Otherwise the
    tokenizer's files are copied as they are. A vocabulary with ChatML's control pieces and no template of its own
    gets ChatML's, both in chat_template.jinja and in tokenizer_config.json (older readers know the latter alone).
    """
    ids, origin = token_ids(tokenizer), origin or Origin()
    found: dict[str, Path | bytes] = {CONFIG: dump({**config_to_hf(config, ids, dtype), **origin.config}),
                                      GENERATION: dump(generation_config(ids, origin))}
    if tokenizer is None:
        return found
    found |= tokenizer.files
    own = TOKENIZER_CONFIG in tokenizer.files
    settings = read_object(tokenizer.files[TOKENIZER_CONFIG]) if own else _tokenizer_config(tokenizer)
    chat = all(tokenizer.token_id(piece) is not None for piece in (START, END))
    if template is None and "chat_template" not in settings and TEMPLATE not in tokenizer.files:
        template = origin.template or (CHATML_TEMPLATE if chat else None)
    if template is not None:
        found[TEMPLATE] = template.encode()
        found[TOKENIZER_CONFIG] = dump({**settings, "chat_template": template})
    elif not own:
        found[TOKENIZER_CONFIG] = dump(settings)
    return found


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer that has none; with a sentencepiece model alone, Llama's class reads it."""
    kind = "PreTrainedTokenizerFast" if "tokenizer.json" in tokenizer.files else "LlamaTokenizer"
    found: dict[str, Any] = {"tokenizer_class": kind, "model_input_names": ["input_ids", "attention_mask"],
                             "clean_up_tokenization_spaces": False}
    names = _names(tokenizer)
    for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        if number in names:
            found[f"{role}_token"] = names[number]
    return found


def _names(tokenizer: Tokenizer) -> dict[int | None, str]:
    """Id -> text of the control tokens."""
    common = ("<s>", "</s>", "<pad>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>")
    found: dict[int | None, str] = {tokenizer.token_id(piece): piece for piece in common}
    if "tokenizer.json" in tokenizer.files:
        content = parse_object(tokenizer.files["tokenizer.json"].read_bytes(), str(tokenizer.files["tokenizer.json"]))
        added = content.get("added_tokens") or []
        found |= {token["id"]: token["content"] for token in added if isinstance(token, dict)}
    return {number: piece for number, piece in found.items() if number is not None}


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
