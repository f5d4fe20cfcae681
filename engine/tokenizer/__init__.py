"""Text to ids and back: sentencepiece models, and Hugging Face's tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import UserError
from engine.tokenizer.base import Tokenizer, folder_files
from engine.tokenizer.sp import SentencePieceTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a .model file, or a folder with tokenizer.model and/or tokenizer.json.

    Of the two the model is read, unless the json holds more tokens than it (added after training). Raises UserError
    when there is none or it cannot be read."""
    where = Path(path)
    if where.is_file() and where.suffix == ".model":
        return SentencePieceTokenizer(where, {"tokenizer.model": where})
    if not where.is_dir():
        raise UserError(f"{path} is neither a .model file nor a folder with tokenizer.model or tokenizer.json")
    files = folder_files(where)
    if "tokenizer.model" in files:
        tokenizer = SentencePieceTokenizer(files["tokenizer.model"], files)
        if "tokenizer.json" not in files or _count(files["tokenizer.json"]) <= tokenizer.vocab_size:
            return tokenizer
    if "tokenizer.json" in files:
        # Imported here because `tokenizers` is optional; the rest of the engine runs without it.
        from engine.tokenizer.fast import FastTokenizer

        return FastTokenizer(files["tokenizer.json"], files)
    raise UserError(f"{path} holds neither tokenizer.model nor tokenizer.json")


def _count(path: Path) -> int:
    """The highest id in a tokenizer.json + 1."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max([*ids, *(token["id"] for token in content.get("added_tokens") or [])]) + 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no tokenizer.json: {error!r}") from None
