"""A Hugging Face tokenizer.json as a Tokenizer, through the optional package `tokenizers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.tokenizer.base import Encoder, Tokenizer, check_encodable, token_dtype
from engine.tokenizer.cut import SPACE, CutEncoder
from engine.tokenizer.folder import hash_of, named_tokens
from engine.tokenizer.json_file import (
    CannotCut,
    Json,
    Plan,
    byte_vocabulary,
    merge_pairs,
    plan,
    read_tokenizer_json,
    steps_of,
    text_tokens,
)
from engine.tokenizer.patterns import PatternEncoder, doubtful

_WORD = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")


class FastTokenizer(Tokenizer):
    """Reads tokenizer.json; bos, eos and pad come from tokenizer_config.json or special_tokens_map.json beside it."""

    def __init__(self, path: Path, files: dict[str, Path]) -> None:
        """Raises UserError when `tokenizers` is missing or refuses the file."""
        self._path = path
        read_tokenizer_json(path)
        self._tokenizer = _read(path)
        # Whatever the file asks for: no cutting, no padding, and "</s>" in a text is text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._ids:
            raise UserError(f"{path} holds an empty vocabulary")
        self.vocab_size = max(self._ids.values()) + 1
        named = named_tokens(path.parent)
        self.bos_id, self.eos_id, self.pad_id = (self._ids.get(named.get(n, "")) for n in ("bos", "eos", "pad"))
        self.files, self.hash = files, hash_of(path.read_bytes())

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        check_encodable(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer.decode. Raises ValueError for a negative id."""
        numbers = [int(number) for number in ids]
        if any(number < 0 for number in numbers):
            raise ValueError(f"{min(numbers)} is no id")
        return str(self._tokenizer.decode(numbers, skip_special_tokens=True))

    def token_id(self, piece: str) -> int | None:
        """See Tokenizer.token_id."""
        return self._ids.get(piece)

    def _build_memo(self) -> tuple[Encoder | None, str]:
        content = read_tokenizer_json(self._path)
        try:
            how = plan(content)
        except CannotCut as reason:
            return None, f"tokenizers itself: {reason}"
        looked_for = [token["content"].replace(SPACE, " ") for token in text_tokens(content)]
        if how.pattern is None:
            guarded = _Guarded(self._spaced(content, how), self, str, looked_for, classed=False)
            return guarded, "memo encoder (exact): tokenizers encodes each new segment between safe cuts once"
        memo = self._byte_level(content["model"], how, how.pattern)
        guarded = _Guarded(memo, self, self._normalizer(content), looked_for, classed=True)
        return guarded, "memo encoder (exact): each new word is split by the pattern and merged once"

    def _spaced(self, content: Json, how: Plan) -> Encoder:
        """Of a vocabulary that writes a space as U+2581."""
        pieces = ["".join(pair) for pair in merge_pairs(content["model"])]
        if how.split_spaces:
            pieces = [part for piece in pieces for part in _WORD.findall(piece)]

        def normalize(text: str) -> str:
            text = text.replace(SPACE, " ")
            spare = how.prefix == "never" or (how.prefix == "unless" and text.startswith(" "))
            return text if spare else " " + text

        def encode(segments: list[str]) -> list[list[int]]:
            if not how.split_spaces:
                return self._segments(segments)
            return [[number for ids in self._segments(_WORD.findall(one)) for number in ids] for one in segments]

        return CutEncoder(pieces, encode, normalize, token_dtype(self.vocab_size))

    def _byte_level(self, model: Json, how: Plan, pattern: str) -> Encoder:
        """Of a vocabulary of bytes behind a pattern."""

        def normalize(text: str) -> str:
            return " " + text if how.prefix == "unless" and text and not text.startswith(" ") else text

        return PatternEncoder(pattern, byte_vocabulary(model), token_dtype(self.vocab_size), normalize)

    def _segments(self, segments: list[str]) -> list[list[int]]:
        tokenize = self._tokenizer.model.tokenize
        return [[token.id for token in tokenize(segment)] for segment in segments]

    def _normalizer(self, content: Json) -> Callable[[str], str]:
        """The file's own normalizer, passed by where it cannot change anything."""
        normalizer = self._tokenizer.normalizer
        if normalizer is None:
            return str
        forms = {step.get("type") for step in steps_of(content.get("normalizer"), "normalizers")}
        ascii_stays = forms <= {"NFC", "NFD", "NFKC", "NFKD"}
        return lambda text: text if ascii_stays and text.isascii() else str(normalizer.normalize_str(text))


class _Guarded:
    """A memo encoder that leaves to `tokenizers` the few texts it is not meant for: those that hold an added token that
    is looked for in text, or (classed) a character that the two pattern engines may class differently."""

    def __init__(
        self,
        memo: Encoder,
        reference: FastTokenizer,
        prepare: Callable[[str], str],
        looked_for: Sequence[str],
        *,
        classed: bool,
    ) -> None:
        self._memo, self._reference, self._prepare = memo, reference, prepare
        self._looked_for, self._classed = looked_for, classed

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """See Encoder.encode."""
        prepared = [self._prepare(text) for text in texts]
        left = [self._leaves(text, ready) for text, ready in zip(texts, prepared, strict=True)]
        ours = iter(self._memo.encode([ready for ready, skip in zip(prepared, left, strict=True) if not skip]))
        dtype = token_dtype(self._reference.vocab_size)
        return [
            np.array(self._reference.encode(text), dtype).tobytes() if skip else next(ours)
            for text, skip in zip(texts, left, strict=True)
        ]

    def _leaves(self, text: str, ready: str) -> bool:
        if self._looked_for:
            shown = [one.replace(SPACE, " ") for one in ((text,) if text is ready else (text, ready))]
            if any(token in one for token in self._looked_for for one in shown):
                return True
        return self._classed and doubtful(text)


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
