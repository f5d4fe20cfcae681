"""Exact duplicates: a 128-bit hash of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

DIGEST_BYTES = 16


class Exact:
    """Duplicates are texts that are equal, character for character, as they stand when they come here: after cleaning.

    BLAKE2b cut to 128 bits: among 10^12 different texts the chance that any two share a hash is 10^-15."""

    name = "exact"
    bands = 1
    words = DIGEST_BYTES // 8
    """64-bit words in a key: documents that agree in one band's key are duplicates."""

    def __repr__(self) -> str:
        return f"exact, {8 * DIGEST_BYTES} bits"

    def signature(self, text: str) -> bytes:
        """The signature of one document, 16 bytes."""
        # A lone surrogate has no UTF-8; it is for the reader to refuse, not for this place to die of.
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """uint64 [documents, 2]."""
        digests = b"".join(map(self.signature, texts))
        return np.frombuffer(digests, "<u8").astype(np.uint64).reshape(len(texts), self.words)
