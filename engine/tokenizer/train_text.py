"""Text as sentencepiece's trainer takes it: documents cut to its limit, and a count of what it can't learn from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

SENTENCE_BYTES = 4192
"""sentencepiece's own limit, above which it drops a sentence without a word."""
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
NAMED = (UNK, BOS, EOS, PAD)
"""The control pieces every vocabulary has, ids 0 to 3."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_RESERVED = ("\u2585", "\0")  # the trainer drops sentences that hold the first, and ends them at the second
_REPLACED = str.maketrans(dict.fromkeys(_RESERVED, " "))


@dataclass
class Survey:
    """What the text to train on holds."""

    documents: int = 0
    text_bytes: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    spelled: int = 0
    """Control pieces and byte names spelled out in text; the trainer skips them."""

    @property
    def replaced(self) -> int:
        """Characters the trainer can't take, which are given to it as spaces."""
        return sum(self.characters[one] for one in _RESERVED)

    def coverage(self, room: int) -> float:
        """The share of characters to give a piece of their own: nearly all, less where that would fill half the room
        (Chinese in a small vocabulary). sentencepiece takes no less than 0.98; the rest is spelled in bytes."""
        common = sum(number for _, number in self.characters.most_common(max(room // 2, 1)))
        return min(0.99995, max(0.98, common / max(self.characters.total(), 1)))


def survey(documents: Iterable[str], special: Sequence[str]) -> Survey:
    """Counts the documents through."""
    found = Survey()
    spelled = re.compile("|".join(map(re.escape, (*NAMED, *special))) + "|<0x[0-9A-F]{2}>")
    for document in documents:
        found.documents += 1
        found.text_bytes += len(document.encode("utf-8"))
        found.characters.update(document)
        if "<" in document or special:
            found.spelled += sum(1 for _ in spelled.finditer(document))
    return found


def sentences(documents: Iterable[str], limit: int = SENTENCE_BYTES) -> Iterator[str]:
    """Documents cut into pieces of at most `limit` bytes of UTF-8: at line ends where possible, else behind a space,
    else anywhere."""
    for document in documents:
        piece: list[str] = []
        size = 0
        for line in _short_lines(document.translate(_REPLACED), limit):
            length = len(line.encode("utf-8"))
            if size + length > limit:
                yield "".join(piece)
                piece, size = [], 0
            piece.append(line)
            size += length
        if piece:
            yield "".join(piece)


def _short_lines(text: str, limit: int) -> Iterator[str]:
    step = limit // 4  # a character is at most four bytes
    for line in text.splitlines(keepends=True):
        at = 0
        while len(line) - at > step:
            end = line.rfind(" ", at + step // 2, at + step) + 1 or at + step
            yield line[at:end]
            at = end
        yield line[at:]
