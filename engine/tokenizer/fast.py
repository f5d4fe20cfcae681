"""A Hugging Face tokenizer.json as a Tokenizer, through the optional package `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.tokenizer.base import Encoder, Tokenizer, check_encodable, token_dtype
from engine.tokenizer.control import control_pieces, with_special, without_names
from engine.tokenizer.cut import SPACE, CutEncoder
from engine.tokenizer.folder import hash_of, named_tokens, special_tokens
from engine.tokenizer.json_file import (
    CannotCut,
    Json,
    Plan,
    added_special,
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
        as_it_is = read_tokenizer_json(path)
        named = named_tokens(files)
        control = control_pieces(named.values(), special_tokens(files), added_special(as_it_is))
        content = with_special(as_it_is, control)
        self._tokenizer = _read(path, None if content is as_it_is else content)
        for_text = without_names(content, control)
        self._content: Json = content if for_text is None else for_text
        self._encoder = self._tokenizer if for_text is None else _read(path, for_text)
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._ids:
            raise UserError(f"{path} holds an empty vocabulary")
        self.vocab_size = max(self._ids.values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (self._ids.get(named.get(n, "")) for n in ("bos", "eos", "pad"))
        self.files, self.hash = files, hash_of(path.read_bytes())

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        check_encodable(text)
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer.decode. Raises ValueError for a negative id."""
        numbers = [int(number) for number in ids]
        if any(number < 0 for number in numbers):
            raise ValueError(f"{min(numbers)} is no id")
        return str(self._tokenizer.decode(numbers, skip_special_tokens=True))

    def token_id(self, piece: str) -> int | None:
        """See Tokenizer.token_id."""
        return self._ids.get(piece)

    def piece(self, number: int) -> str | None:
        """See Tokenizer.piece."""
        found = self._tokenizer.id_to_token(number) if number >= 0 else None
        return None if found is None else str(found)

    def samples(self) -> list[str]:
        """See Tokenizer.samples."""
        return [self.decode([number]) for number in self._ids.values()]

    def _build_memo(self) -> tuple[Encoder | None, str]:
        content = self._content
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
        tokenize = self._encoder.model.tokenize
        return [[token.id for token in tokenize(segment)] for segment in segments]

    def _normalizer(self, content: Json) -> Callable[[str], str]:
        """The file's own normalizer, passed by where it cannot change anything."""
        normalizer = self._encoder.normalizer
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


def _read(path: Path, changed: Json | None) -> Any:
    """What the package makes of the file at `path`, or of its content as changed by us."""
    try:
        from tokenizers import Tokenizer as Rust
    except ImportError:
        raise UserError(f'{path} needs the package "tokenizers": pip install tokenizers') from None
    try:
        found = Rust.from_str(path.read_text(encoding="utf-8-sig") if changed is None else json.dumps(changed))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust arrives as a bare BaseException
        raise UserError(f"{path} is no tokenizer that can be read: {str(error)[:200]}") from None
    # Whatever the file asks for: no cutting, no padding, and "</s>" in a text is text.
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found
