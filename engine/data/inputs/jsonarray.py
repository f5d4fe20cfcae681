"""A JSON array of any size, an element at a time: never more in memory than the element being read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO

from engine.data.inputs.items import (
    MAX_RECORD_BYTES,
    NO_TEXT,
    NOT_OF_ENCODING,
    BadRecord,
    Document,
    Fault,
    decoder,
    text_of_row,
)

_SPACE = re.compile(r"[ \t\r\n]*")
_READ = 1 << 16


class _Window:
    """The text between what has been read and what has been used: all before `at`."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._decoder = stream, decoder(encoding)
        self.text, self.at, self.ended = "", 0, False
        self._line, self._counted = 1, 0  # the number of the line that this place in the text is on
        self.grow()
        self.text = self.text.removeprefix("\ufeff")

    def grow(self) -> None:
        """Reads on, as much again as is held: an element is parsed a few times at most, however long."""
        self.here()
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        block = self._stream.read(max(_READ, len(self.text)))
        self.ended = not block
        self.text += self._decoder.decode(block, self.ended)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.grow()

    def here(self) -> int:
        """The number of the line the next character stands on."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line


def read_array(stream: IO[bytes], encoding: str, json_key: str) -> Iterator[Document | Fault]:
    """A document an element. After an element that is no JSON the next cannot be found: one fault, and the end."""
    window = _Window(stream, encoding)
    window.peek()
    window.at += 1  # the bracket by which the file was told to be an array
    following = window.peek()
    while following and following != "]":
        line = window.here()
        try:
            row, whole = _element(window)
        except BadRecord as error:
            yield Fault(line, f"{error}; the array cannot be read beyond this element")
            return
        try:
            if not whole:
                raise BadRecord(NOT_OF_ENCODING)
            yield Document(line, text_of_row(row, json_key))
        except BadRecord as error:
            yield Fault(line, str(error))
        following = window.peek()
        if following == ",":
            window.at += 1
            following = window.peek()
            if following == "]":
                following = ","  # a comma with nothing behind it is no JSON, and is said to be none
        elif following and following != "]":
            yield Fault(window.here(), f"not JSON: {following!r} where a comma or ] should be; the array ends here")
            return
    if not following:
        yield Fault(window.here(), "the file ends within the array")
        return
    window.at += 1
    if window.peek():
        yield Fault(window.here(), "there is more text after the array's end")


def _element(window: _Window) -> tuple[object, bool]:
    """The next value, and whether all its bytes are of the encoding. Raises BadRecord."""
    decoder = json.JSONDecoder(parse_int=float)  # int refuses more digits than a few thousand
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.ended:  # else a number might go on
                begin, window.at = window.at, end
                return value, window.text.find(NO_TEXT, begin, end) < 0
            problem = "longer than read"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if window.ended:
            raise BadRecord(f"not JSON: {problem}")
        if len(window.text) - window.at > MAX_RECORD_BYTES:
            raise BadRecord(f"the element is longer than {MAX_RECORD_BYTES:,} bytes, or not JSON: {problem}")
        window.grow()
