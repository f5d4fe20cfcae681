"""A JSON array of any size, an element at a time: never more in memory than the element being read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from engine.data.inputs.items import (
    MAX_RECORD_BYTES,
    NO_TEXT,
    NOT_OF_ENCODING,
    BadRecord,
    Document,
    Fault,
    decoder,
    object_of,
    text_of_row,
)

_SPACE = re.compile(r"[ \t\r\n]*")
_READ = 1 << 16
_LONGEST_WORD = 16
"""Characters of "-Infinity" or an escape, which may be cut at the end of what has been read; and a few more."""
_OPEN_STRING = "Unterminated string"
LENIENT = json.JSONDecoder(parse_int=float, object_pairs_hook=object_of)
"""int refuses more digits than a few thousand."""


class Window:
    """The text between what has been read and what has been used: all before `at`."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._decoder, self.encoding = stream, decoder(encoding), encoding
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

    def line_at(self, position: int) -> int:
        """The number of the line that a position in the text, not before `at`, stands on."""
        return self.here() + self.text.count("\n", self.at, position)

    def here(self) -> int:
        """The number of the line the next character stands on."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line


class Element(NamedTuple):
    """A value of an array, the line it begins on, and whether all its bytes are of the encoding."""

    line: int
    value: Any
    whole: bool


def read_array(stream: IO[bytes], encoding: str, json_key: str) -> Iterator[Document | Fault]:
    """A document an element. After an element that is no JSON the next cannot be found: one fault, and the end."""
    window = Window(stream, encoding)
    for found in read_elements(window):
        if isinstance(found, Fault):
            yield found
            return
        try:
            if not found.whole:
                raise BadRecord(NOT_OF_ENCODING)
            yield Document(found.line, text_of_row(found.value, json_key))
        except BadRecord as error:
            yield Fault(found.line, str(error))
    if window.peek():
        yield Fault(window.here(), "there is more text after the array's end")


def read_elements(window: Window, decoder: json.JSONDecoder = LENIENT,
                  most: int = MAX_RECORD_BYTES) -> Iterator[Element | Fault]:
    """The elements of the array that begins next, each of at most `most` characters, until the window is behind it. A
    fault ends them."""
    window.peek()
    window.at += 1  # the bracket by which this was told to be an array
    following = window.peek()
    while following and following != "]":
        line = window.here()
        try:
            value, whole = take_value(window, decoder, most)
        except BadRecord as error:
            yield Fault(line, f"{error}; the array cannot be read beyond this element")
            return
        yield Element(line, value, whole)
        following = window.peek()
        if following == ",":
            window.at += 1
            following = window.peek()
            if following == "]":
                yield Fault(window.here(), "not JSON: a comma with nothing behind it before the array's end")
                return
        elif following and following != "]":
            yield Fault(window.here(), f"not JSON: {following!r} where a comma or ] should be; the array ends here")
            return
    if not following:
        yield Fault(window.here(), "the file ends within the array, without its ]: it is cut short")
        return
    window.at += 1


def take_value(window: Window, decoder: json.JSONDecoder = LENIENT, most: int = MAX_RECORD_BYTES) -> tuple[Any, bool]:
    """The next value, and whether all its bytes are of the encoding. Raises BadRecord."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.ended:  # else a number might go on
                begin, window.at = window.at, end
                return value, window.text.find(NO_TEXT, begin, end) < 0
            problem, final = "longer than read", False
        except json.JSONDecodeError as error:  # its line and column are the window's own, and tell nothing
            place, begins = window.line_at(error.pos), window.here()
            problem = error.msg + (f" (on line {place})" if place != begins else "")
            final = _is_final(error)
            if window.ended and (error.pos >= len(window.text.rstrip()) or error.msg.startswith(_OPEN_STRING)):
                problem += "; the file ends within this value: it may be cut short"
        except ValueError as error:
            problem, final = str(error), True
        except RecursionError:
            problem, final = "nested too deeply", True
        if window.ended or final:
            raise BadRecord(f"not JSON: {problem}")
        if len(window.text) - window.at > most:
            raise BadRecord(f"the element is longer than {most:,} bytes, or not JSON: {problem}")
        window.grow()


def _is_final(error: json.JSONDecodeError) -> bool:
    """Whether more text would not mend it: the fault lies before the end of what has been read."""
    return error.pos < len(error.doc) - _LONGEST_WORD and not error.msg.startswith(_OPEN_STRING)
