"""Byte-pair encoding of bytes: the merge loop, and the vocabularies of GPT-2's and tiktoken's files."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Collection, Iterator, Mapping
from heapq import heapify, heappop, heappush
from pathlib import Path

from engine.errors import UserError
from engine.tokenizer.folder import check_ids, read_json

UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
"""The bytes that a text can hold."""


def byte_alphabet() -> dict[int, str]:
    """GPT-2's way of writing any byte as a printable character: itself where it is one, else one from U+0100 on
    (Radford et al. 2019, section 2.2; openai/gpt-2, `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(others)}


_BYTE_OF = {ord(character): byte for byte, character in byte_alphabet().items()}


class ByteVocabulary:
    """Byte strings, their ids, and which pairs are joined in which order."""

    def __init__(
        self,
        ids: Mapping[bytes, int],
        ranks: Mapping[tuple[bytes, bytes], int] | None = None,
        *,
        whole_first: bool = False,
    ) -> None:
        """ranks: of each pair, no two alike; the lowest is joined first. whole_first: a text that is a piece itself is
        that piece, however merging would go. ranks None, as in tiktoken: a pair's rank is the id of what it makes, and
        whole_first holds."""
        self.ids, self.whole_first, self._ranks = ids, whole_first or ranks is None, ranks
        self._rank: Callable[[bytes, bytes], int | None]
        if ranks is None:
            self._rank = lambda left, right: ids.get(left + right)
        else:
            self._rank = lambda left, right: ranks.get((left, right))

    def without(self, pieces: Collection[bytes]) -> ByteVocabulary:
        """The same without some pieces: no text becomes one of them, and nothing is joined to one."""
        if not pieces:
            return self
        ids = {piece: number for piece, number in self.ids.items() if piece not in pieces}
        ranks = self._ranks and {
            (one, two): rank
            for (one, two), rank in self._ranks.items()
            if not {one, two, one + two} & set(pieces)
        }
        return ByteVocabulary(ids, ranks, whole_first=self.whole_first)

    def encode(self, text: bytes) -> list[int]:
        """The ids of a pre-tokenizer's piece."""
        if self.whole_first and text in self.ids:
            return [self.ids[text]]
        return [self.ids[part] for part in self.merge(text)]

    def pairs(self, longest: int) -> Iterator[tuple[bytes, bytes, int]]:
        """The pairs that merging may join, and their ranks; those that make more than `longest` bytes may lack."""
        if self._ranks is not None:
            yield from ((one, two, rank) for (one, two), rank in self._ranks.items())
            return
        for piece, rank in self.ids.items():
            for at in range(1, len(piece) if len(piece) <= longest else 0):
                one, two = piece[:at], piece[at:]
                if (at == 1 or one in self.ids) and (len(two) == 1 or two in self.ids):
                    yield one, two, rank

    def merge(self, text: bytes) -> list[bytes]:
        """Joins neighbours until none has a rank: always a pair of the lowest rank, the leftmost of several.

        Takes about n log n steps for n bytes. By the time a place in the queue is reached its left part may have gone
        into another, or its pair may have grown; then the rank there is another one, and the place is passed over."""
        rank = self._rank
        parts = [text[at : at + 1] for at in range(len(text))]
        after, before = [*range(1, len(text)), -1], list(range(-1, len(text) - 1))  # -1: nothing
        ranks = map(rank, parts, parts[1:])
        queue = [(number, at) for at, number in enumerate(ranks) if number is not None]
        heapify(queue)
        while queue:
            number, at = heappop(queue)
            right = after[at]
            if right < 0 or not parts[at] or rank(parts[at], parts[right]) != number:
                continue
            parts[at] += parts[right]
            parts[right] = b""
            after[at] = following = after[right]
            if following >= 0:
                before[following] = at
                if (new := rank(parts[at], parts[following])) is not None:
                    heappush(queue, (new, at))
            previous = before[at]
            if previous >= 0 and (new := rank(parts[previous], parts[at])) is not None:
                heappush(queue, (new, previous))
        return [part for part in parts if part]


_MOST_UNMADE = 128
"""Entries that no merge makes are control pieces. Vocabularies keep some in reserve: so many, or a tenth, at most."""


def read_gpt2(vocab: Path, merges: Path) -> tuple[ByteVocabulary, dict[str, int]]:
    """The pair vocab.json and merges.txt (at OpenAI encoder.json and vocab.bpe), and the entries that no merge makes,
    as "<|endoftext|>": text and id. Raises UserError, naming the line, for whatever contradicts itself."""
    entries = read_json(vocab)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{vocab} holds no vocabulary: a JSON object of pieces and ids is needed")
    check_ids(entries, vocab)
    ranks: dict[tuple[bytes, bytes], int] = {}
    try:
        lines = merges.read_bytes().decode("utf-8-sig").splitlines()  # also \r\n
    except UnicodeDecodeError as error:
        raise UserError(f"{merges} is not UTF-8 at byte {error.start}") from None
    made = set(map(chr, _BYTE_OF))
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{merges}:{number}: a merge is two pieces with a space between them, not {line[:80]!r}")
        missing = [piece for piece in (*pair, "".join(pair)) if piece not in entries]
        if missing:
            raise UserError(f"{merges}:{number}: {missing[0]!r} is not in {vocab.name}")
        key = _to_bytes(pair[0], merges, number), _to_bytes(pair[1], merges, number)
        if key in ranks:
            raise UserError(f"{merges}:{number}: this merge was listed before, as merge {ranks[key] + 1}")
        ranks[key] = len(ranks)
        made.add("".join(pair))
    ids = {_to_bytes(piece, vocab, 0): number for piece, number in entries.items() if piece in made}
    _check_bytes(ids, vocab)
    unmade = {piece: number for piece, number in entries.items() if piece not in made}
    if len(unmade) > max(_MOST_UNMADE, len(entries) // 10):
        holds = f"holds {len(ranks):,} merges" if ranks else "holds no merge"
        raise UserError(f"{merges} {holds}, and {len(unmade):,} of the {len(entries):,} pieces in {vocab.name} cannot "
                        "be made by them: it is empty, cut short or of another vocabulary")
    return ByteVocabulary(ids, ranks), unmade


def _to_bytes(piece: str, path: Path, line: int) -> bytes:
    try:
        return bytes(_BYTE_OF[ord(character)] for character in piece)
    except KeyError:
        raise UserError(f"{path}:{line}: {piece!r} is not written in GPT-2's alphabet of bytes") from None


def read_tiktoken(path: Path) -> ByteVocabulary:
    """A .tiktoken file: on each line a piece in base64 and its rank. Raises UserError, naming the line."""
    ids: dict[bytes, int] = {}
    owner: dict[int, int] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            token, value = base64.b64decode(piece, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not a piece in base64 and its rank, but {line[:60]!r}") from None
        if not token or value < 0:
            raise UserError(f"{path}:{number}: " + (f"the rank is {value}" if token else "the piece is empty"))
        if token in ids or value in owner:
            what = f"the rank {value}" if value in owner else f"the piece {token!r}"
            raise UserError(f"{path}:{number}: {what} was there before")
        ids[token], owner[value] = value, number
    if not ids:
        raise UserError(f"{path} is empty")
    check_ids(ids, path)
    _check_bytes(ids, path)
    return ByteVocabulary(ids)


def is_tiktoken(path: Path) -> bool:
    """Whether a file's first line looks like one of a .tiktoken file, whatever its name."""
    with open(path, "rb") as file:
        words = file.readline(1024).removeprefix(b"\xef\xbb\xbf").split()
    try:
        return len(words) == 2 and words[1].isdigit() and bool(base64.b64decode(words[0], validate=True))
    except binascii.Error:
        return False


def _check_bytes(ids: Mapping[bytes, int], path: Path) -> None:
    missing = [byte for byte in UTF8_BYTES if bytes([byte]) not in ids]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(UTF8_BYTES)} bytes that text is made of, first 0x{missing[0]:02x}"
        )
