"""GPT-2's vocab.json and merges.txt, and tiktoken's rank files, as Tokenizers: nothing but this package is needed."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from engine.errors import UserError
from engine.tokenizer.base import Encoder, Tokenizer, check_encodable, token_dtype
from engine.tokenizer.bpe import ByteVocabulary, read_gpt2, read_tiktoken
from engine.tokenizer.bytes_json import byte_level_json
from engine.tokenizer.control import END_OF_TEXT, control_pieces
from engine.tokenizer.files import CONFIG
from engine.tokenizer.folder import (
    added_tokens,
    check_distinct,
    hash_of,
    named_tokens,
    read_object,
    special_tokens,
)
from engine.tokenizer.patterns import CL100K, GPT2, KNOWN, O200K, QWEN2, R50K, PatternEncoder

_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_TIKTOKENS: Mapping[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (R50K, {END_OF_TEXT: 50256}),
    "p50k_base": (R50K, {END_OF_TEXT: 50256}),
    "cl100k_base": (
        CL100K,
        {END_OF_TEXT: 100257} | {name: 100258 + place for place, name in enumerate(_FIM)} | {"<|endofprompt|>": 100276},
    ),
    "o200k_base": (O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}
"""Pattern and special tokens of OpenAI's own files, by name (openai/tiktoken, `tiktoken_ext/openai_public.py`)."""
_CLASSES = {"GPT2": GPT2, "Roberta": GPT2, "Qwen2": QWEN2, "Llama": GPT2}
"""A tokenizer_class is one of them + Tokenizer(Fast). Checkpoints of Triax once called any files without a
tokenizer.json a Llama's; a real one has other files."""


class ByteLevelTokenizer(Tokenizer):
    """Splits text by a pattern and joins the bytes of each piece. Special tokens are never looked for in text."""

    def __init__(
        self,
        vocabulary: ByteVocabulary,
        pattern: str,
        special: Mapping[str, int],
        files: dict[str, Path],
        *,
        defining: Sequence[Path],
        named: Mapping[str, str],
        nfc: bool = False,
    ) -> None:
        """pattern: the pre-tokenizer's, for the package regex. special: text and id of tokens beside the vocabulary, or
        of control pieces in it, which text then does not become.
        defining: the files that hash stands for. named: which tokens are bos, eos and pad. nfc: text is brought to
        Unicode's form NFC first, as Qwen's is. Raises UserError where the parts do not fit."""
        self._pattern, self._nfc = pattern, nfc
        self._split = _compiled(pattern)
        self._bytes = {number: piece for piece, number in vocabulary.ids.items()}
        for text, number in special.items():
            if self._bytes.get(number, text.encode()) != text.encode():
                raise UserError(f"{text!r} has the id {number}, which is that of {self._bytes[number]!r}")
        check_distinct(special, "special tokens")
        control = control_pieces(special, named.values(), special_tokens(files))
        held = {piece: vocabulary.ids[piece.encode()] for piece in control if piece.encode() in vocabulary.ids}
        self._special = {**special, **held}
        self._vocabulary = vocabulary.without({piece.encode() for piece in held})
        self._bytes = {number: piece for piece, number in self._vocabulary.ids.items()}
        self.vocab_size = max([*self._bytes, *special.values()]) + 1
        self.bos_id, self.eos_id, self.pad_id = (self.token_id(named.get(role, "")) for role in ("bos", "eos", "pad"))
        self.files = files
        settings = repr((pattern, sorted(special.items()), nfc)).encode()
        self.hash = hash_of(*(path.read_bytes() for path in defining), settings)

    def _build_memo(self) -> tuple[Encoder | None, str]:
        if self._pattern not in KNOWN:
            return None, "its own merge loop: where this pattern's pieces end is not known, so text is not cut"
        normalize = self._normalized if self._nfc else None
        memo = PatternEncoder(self._pattern, self._vocabulary, token_dtype(self.vocab_size), normalize)
        return memo, "memo encoder (exact): each new word is split by the pattern and merged once"

    def _normalized(self, text: str) -> str:
        return text if text.isascii() else unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode. Raises UserError where the pattern leaves out a part of the text."""
        check_encodable(text)
        text = self._normalized(text) if self._nfc else text
        pieces = self._split(text)
        if sum(map(len, pieces)) < len(text):
            raise UserError(f"the pre-tokenizer's pattern leaves out a part of the text: {self._pattern[:80]}")
        return [number for piece in pieces for number in self._vocabulary.encode(piece.encode("utf-8"))]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer.decode. Bytes that are no UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        special = set(self._special.values())
        numbers = [int(number) for number in ids]
        unknown = [number for number in numbers if number not in self._bytes and number not in special]
        if unknown:
            raise ValueError(f"the id {unknown[0]} is not in the vocabulary of {self.vocab_size}")
        return b"".join(self._bytes.get(number, b"") for number in numbers).decode("utf-8", errors="replace")

    def token_id(self, piece: str) -> int | None:
        """See Tokenizer.token_id."""
        found = self._special.get(piece)
        return self._vocabulary.ids.get(piece.encode("utf-8", "replace")) if found is None else found


    def piece(self, number: int) -> str | None:
        """See Tokenizer.piece."""
        special = next((piece for piece, held in self._special.items() if held == number), None)
        held = self._bytes.get(number)
        try:
            return held.decode("utf-8") if special is None and held is not None else special
        except UnicodeDecodeError:
            return None

    def samples(self) -> list[str]:
        """See Tokenizer.samples."""
        return [piece.decode("utf-8", "ignore") for piece in self._vocabulary.ids]

    def tokenizer_json(self) -> dict[str, Any]:
        """The same vocabulary as a tokenizer.json."""
        return byte_level_json(self._vocabulary, self._pattern, self._special, nfc=self._nfc)


def load_gpt2(vocab: Path, merges: Path, files: dict[str, Path]) -> ByteLevelTokenizer:
    """Reads the pair. tokenizer_config.json beside it may name bos, eos and pad, added tokens, and as "pat_str" another
    pattern than GPT-2's. Raises UserError where the files contradict themselves."""
    folder = vocab.parent
    vocabulary, unmade = read_gpt2(vocab, merges)
    config = read_object(folder / CONFIG)
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast").removesuffix("Tokenizer")
    pattern = config.get("pat_str") or _CLASSES.get(kind)
    if pattern is None:
        raise UserError(
            f"{folder / CONFIG}: how {kind}Tokenizer splits text is not known here; use the model's tokenizer.json, or "
            'give the pattern as "pat_str"'
        )
    named = {"bos": END_OF_TEXT, "eos": END_OF_TEXT} | named_tokens(files)
    special = unmade | added_tokens(files, len(vocabulary.ids) + len(unmade))
    return ByteLevelTokenizer(
        vocabulary, _text(pattern, folder), special, files, defining=[vocab, merges], named=named, nfc=kind == "Qwen2"
    )


def load_tiktoken(path: Path, files: dict[str, Path]) -> ByteLevelTokenizer:
    """Reads a rank file. Its pattern is GPT-4's (CL100K) unless the file has the name of another of OpenAI's, or
    tokenizer_config.json beside it gives one as "pat_str"; special tokens and their roles come from there too."""
    folder = path.parent
    config = read_object(folder / CONFIG)
    pattern, special = _TIKTOKENS.get(path.stem, (CL100K, {}))
    pattern = _text(config.get("pat_str") or pattern, folder)
    vocabulary = read_tiktoken(path)
    special = special | added_tokens(files, len(vocabulary.ids) + len(special))
    named = {"eos": END_OF_TEXT} | named_tokens(files)
    return ByteLevelTokenizer(vocabulary, pattern, special, files, defining=[path], named=named)


def _text(pattern: object, folder: Path) -> str:
    if not isinstance(pattern, str):
        raise UserError(f'{folder / CONFIG}: "pat_str" is a {type(pattern).__name__}, not text')
    return pattern


def _compiled(pattern: str) -> Callable[[str], list[str]]:
    try:
        found = regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"the pre-tokenizer's pattern {pattern[:80]!r} cannot be read: {error}") from None
    if found.groups:
        raise UserError(f"the pre-tokenizer's pattern {pattern[:80]!r} has groups that capture; write them as (?:...)")
    return found.findall
