"""Text to ids and back: sentencepiece models, Hugging Face's tokenizer.json, GPT-2's and tiktoken's files."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import UserError, shown
from engine.signature import refuse_pointer
from engine.tokenizer.base import Tokenizer
from engine.tokenizer.bpe import is_tiktoken
from engine.tokenizer.files import CONFIG, JSON, MODEL, PAIRS, TIKTOKEN, is_tokenizer, tokenizer_files
from engine.tokenizer.sp import SentencePieceTokenizer

__all__ = ["Tokenizer", "is_tokenizer", "load_tokenizer", "tokenizer_files"]


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a .model or .tiktoken file, or a folder that holds one, a tokenizer.json, or GPT-2's vocab.json and
    merges.txt (also named encoder.json and vocab.bpe).

    Of tokenizer.model and tokenizer.json the model is read, unless the json holds more tokens than it (added after
    training); either comes before the others. Raises UserError when there is none or it cannot be read."""
    where = Path(path)
    if os.path.isfile(where):
        refuse_pointer(where)
        return _load_file(where)
    if not os.path.isdir(where):
        raise UserError(
            f"{shown(path)} is neither a .model or .tiktoken file nor a folder with tokenizer.model, tokenizer.json, "
            "or vocab.json and merges.txt"
        )
    files = tokenizer_files(where)
    for file in files.values():
        refuse_pointer(file)
    model = files.get(MODEL)
    if JSON in files:
        # Imported here because `tokenizers` is optional; the rest of the engine runs without it.
        from engine.tokenizer.json_file import count_ids, read_tokenizer_json

        if model is not None and not is_tiktoken(model):
            tokenizer = SentencePieceTokenizer(model, files)
            if count_ids(read_tokenizer_json(files[JSON])) <= tokenizer.pieces:
                return tokenizer
        from engine.tokenizer.fast import FastTokenizer

        return FastTokenizer(files[JSON], files)
    if model is not None:
        return _load_file(model, files)
    return _load_bytes(where, files)


def _load_file(path: Path, files: dict[str, Path] | None = None) -> Tokenizer:
    """A file by itself; as part of a folder with the others of it."""
    if path.suffix == TIKTOKEN or is_tiktoken(path):
        from engine.tokenizer.bytelevel import load_tiktoken

        beside = {CONFIG: path.with_name(CONFIG)} if path.with_name(CONFIG).is_file() else {}
        # A checkpoint keeps the file under a name by which its folder is known to hold a tokenizer.
        return load_tiktoken(path, files or {f"{path.stem}{TIKTOKEN}": path, **beside})
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, files or {MODEL: path})
    raise UserError(f"{path} is neither a .model file nor a .tiktoken file; give a tokenizer.json as its folder")


def _load_bytes(folder: Path, files: dict[str, Path]) -> Tokenizer:
    """GPT-2's pair, or the folder's one .tiktoken file."""
    from engine.tokenizer.bytelevel import load_gpt2, load_tiktoken

    for vocab, merges in PAIRS:
        if vocab in files and merges in files:
            return load_gpt2(files[vocab], files[merges], files)
    ranks = [name for name in files if name.endswith(TIKTOKEN)]
    if len(ranks) > 1:
        raise UserError(f"{folder} holds {len(ranks)} rank files ({', '.join(ranks)}); give the path of one")
    if ranks:
        return load_tiktoken(files[ranks[0]], files)
    raise UserError(
        f"{folder} holds no tokenizer: tokenizer.model, tokenizer.json, vocab.json with merges.txt, encoder.json with "
        "vocab.bpe, or a .tiktoken file"
    )
