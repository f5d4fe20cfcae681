"""Which files a tokenizer consists of: one list for loading, checkpoints, resumed runs and exports."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""GPT-2's two files, by both pairs of names."""
TIKTOKEN = ".tiktoken"
_NAMES = (MODEL, JSON, CONFIG, SPECIAL_MAP, ADDED, *(name for pair in PAIRS for name in pair), TEMPLATE)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """All files of a tokenizer that are in a folder, by name: whoever copies a tokenizer copies these."""
    found = {name: folder / name for name in _NAMES if (folder / name).is_file()}
    return found | {path.name: path for path in sorted(folder.glob(f"*{TIKTOKEN}")) if path.is_file()}


def is_tokenizer(names: Collection[str]) -> bool:
    """Whether files of these names hold a vocabulary, so that load_tokenizer can read them."""
    pair = any(vocab in names and merges in names for vocab, merges in PAIRS)
    return MODEL in names or JSON in names or pair or any(name.endswith(TIKTOKEN) for name in names)
