"""How the bytes of an input are text: its encoding, found by its first bytes, and any encoding as UTF-8."""

from __future__ import annotations

import codecs
import io
import re
from typing import IO, Any

NO_TEXT = "\udfff"
"""What `decoder` puts in the place of bytes that an encoding does not have: so only the record they are in is lost."""
NOT_OF_ENCODING = "the record holds bytes that its encoding does not have; --encoding names another"

_MARKING = "triax-marking"
codecs.register_error(_MARKING, lambda error: (NO_TEXT, error.end))  # type: ignore[attr-defined]
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UTF16 = re.compile(rb"(?:[^\0]\0){4}|(?:\0[^\0]){4}", re.DOTALL)  # four letters of which any is below U+0100
_DECLARED = re.compile(rb"""\s*<\?xml\s[^>]*?\bencoding\s*=\s*["']([A-Za-z][A-Za-z0-9._-]{0,39})["']""")
# In these a byte 0x0A is a line's end and nothing else, so bytes can be cut into lines before they are decoded.
_LINES_ARE_BYTES = re.compile(
    r"utf-8|ascii|cp(125|43|7\d|8[56]|93|94|95)\d?|(iso8859|koi8|gb|big5|euc|shift_jis|mac).*"
)


def codec_of(name: str) -> str | None:
    """The codec that a name means; None where it means no encoding of text."""
    try:
        # Python's codecs that are no encodings of text refuse the first (base64, rot13) or the second (idna).
        "".encode(name)
        bytes(32).decode(name, "ignore")
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        return None


def marked_encoding(head: bytes) -> str | None:
    """The encoding that a byte-order mark at the beginning of `head` names."""
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), None)


def declared_encoding(head: bytes) -> str | None:
    """The encoding that an XML declaration names (`<?xml version="1.0" encoding="gb18030"?>`), where it can be true: in
    UTF-16 the declaration itself could not be read byte by byte."""
    found = _DECLARED.match(head)
    name = codec_of(found[1].decode("ascii")) if found else None
    return None if name is None or name.startswith(("utf-16", "utf-32")) else name


def is_bare_utf16(head: bytes) -> bool:
    """Whether bytes look like UTF-16 without a byte-order mark."""
    return _UTF16.match(head) is not None


def lines_are_bytes(encoding: str) -> bool:
    """Whether lines can be told apart before decoding."""
    return _LINES_ARE_BYTES.fullmatch(encoding) is not None


def decoder(encoding: str) -> codecs.IncrementalDecoder:
    """Decodes many records at once."""
    return codecs.getincrementaldecoder(encoding)(_MARKING)


def holds_no_text(data: bytes) -> bool:
    """Whether bytes that `AsUtf8` gave stand for some that their encoding does not have."""
    return NO_TEXT.encode("utf-8", "surrogatepass") in data


class AsUtf8(io.RawIOBase):
    """A stream in any encoding as UTF-8, but for what the encoding does not have: see `decoder`."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._decoder = stream, decoder(encoding)
        self._out, self._ended = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out and not self._ended:
            block = self._stream.read(1 << 16)
            self._ended = not block
            self._out = memoryview(self._decoder.decode(block, self._ended).encode("utf-8", "surrogatepass"))
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count
