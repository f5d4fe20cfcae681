"""The files of a serving folder beside its weights: config, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.strict_json import read_object
from engine.config import ModelConfig
from engine.data.chat import CHATML_TEMPLATE, END, START
from engine.hf.config import config_to_hf
from engine.hf.serving import CONFIG, GENERATION, TEMPLATE, TOKENIZER_CONFIG, Origin, generation_config, token_ids
from engine.tokenizer import Tokenizer
from engine.tokenizer.files import JSON, MODEL


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
    settings = read_object(tokenizer.files[TOKENIZER_CONFIG]) if own else tokenizer_config(tokenizer)
    chat = all(tokenizer.token_id(piece) is not None for piece in (START, END))
    if template is None and "chat_template" not in settings and TEMPLATE not in tokenizer.files:
        template = origin.template or (CHATML_TEMPLATE if chat else None)
    if template is not None:
        found[TEMPLATE] = template.encode()
        found[TOKENIZER_CONFIG] = dump({**settings, "chat_template": template})
    elif not own:
        found[TOKENIZER_CONFIG] = dump(settings)
    return found


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer that has none. Its class is one that reads such files; an export gets a
    tokenizer.json, and the class that does as that says."""
    names = tokenizer.files
    kind = "PreTrainedTokenizerFast" if JSON in names else "LlamaTokenizer" if MODEL in names else "GPT2Tokenizer"
    found: dict[str, Any] = {"tokenizer_class": kind, "model_input_names": ["input_ids", "attention_mask"],
                             "clean_up_tokenization_spaces": False}
    for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        piece = None if number is None else tokenizer.piece(number)
        if piece is not None:
            found[f"{role}_token"] = piece
    return found


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
