"""A Hugging Face tokenizer.json as a Tokenizer, through the optional package `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.tokenizer.base import Tokenizer, check_encodable, file_hash


class FastTokenizer(Tokenizer):
    """Reads tokenizer.json; bos, eos and pad come from tokenizer_config.json or special_tokens_map.json beside it."""

    def __init__(self, path: Path, files: dict[str, Path]) -> None:
        """Raises UserError when `tokenizers` is missing or refuses the file."""
        self._tokenizer = _read(path)
        # Whatever the file asks for: no cutting, no padding, and "</s>" in a text is text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._ids:
            raise UserError(f"{path} holds an empty vocabulary")
        self.vocab_size = max(self._ids.values()) + 1
        named = _named_tokens(path.parent)
        self.bos_id, self.eos_id, self.pad_id = (self._ids.get(named.get(n, "")) for n in ("bos", "eos", "pad"))
        self.files, self.hash = files, file_hash(path)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        check_encodable(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer.decode."""
        return str(self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True))

    def token_id(self, piece: str) -> int | None:
        """See Tokenizer.token_id."""
        return self._ids.get(piece)


def _read(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Rust
    except ImportError:
        raise UserError(f'{path} needs the package "tokenizers": pip install tokenizers') from None
    try:
        return Rust.from_str(path.read_text(encoding="utf-8-sig"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust arrives as a bare BaseException
        raise UserError(f"{path} is no tokenizer that can be read: {str(error)[:200]}") from None


def _named_tokens(folder: Path) -> dict[str, str]:
    """bos, eos and pad as text, where a file in the folder names them."""
    named: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{folder / name} is not JSON: {error}") from None
        for role in ("bos", "eos", "pad"):
            value = config.get(f"{role}_token") if isinstance(config, dict) else None
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named.setdefault(role, text)
    return named
