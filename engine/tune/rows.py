"""Rows of tuning data, of any of the usual kinds, read as lists of messages. A bad row is named, never skipped.

Kinds, told apart row by row by their keys:
    messages                                   role, content; content is text or a list of typed text parts
    conversations                              from, value (human, gpt) or role, content
    prompt + completion | response             text, or lists of messages
    instruction (+ input) + output             input follows the instruction after an empty line
    question + answer
"system" beside any of them is the first message. In a message, "train": false, "weight": 0 or "loss_weight": 0 says
that it is context only.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from engine.data.chat import Message
from engine.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
MAX_LINE = 1 << 26
"""Longest line of a .jsonl file in bytes, unpacked; a longer one is no conversation but an accident or an attack."""
MAX_ARRAY = 1 << 30
"""Largest .json array in bytes, unpacked: it must be in memory whole."""
_ALIASES = {"human": "user", "gpt": "assistant"}
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_KINDS = "messages, conversations, " + ", ".join(" + ".join(pair) for pair in _PAIRS)


def read_chats(path: str | Path) -> Iterator[list[Message]]:
    """The conversations of a .jsonl file or of a .json array, gzipped or not (told by content, not by name).

    Raises UserError naming file, line (or row of the array) and keys when a row cannot be understood."""
    for where, row in _rows(Path(path)):
        try:
            if not isinstance(row, dict):
                raise UserError(f"a row is an object, not {type(row).__name__}")
            yield messages_of(row)
        except UserError as error:
            keys = f" (the row's keys: {', '.join(map(str, row))})" if isinstance(row, dict) else ""
            raise UserError(f"{where}: {error}{keys}") from error


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of one row. Raises UserError saying what is wrong with it."""
    for key in ("tools", "history"):
        if row.get(key):
            raise UserError(f'plain ChatML cannot express "{key}"; write it into the messages or remove it')
    messages = _turns(row)
    system = row.get("system")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", _text(system)))
    return messages


def _turns(row: Mapping[str, Any]) -> list[Message]:
    for key in ("messages", "conversations"):
        if key in row:
            return _side(row[key], "user")
    for asked, answered in _PAIRS:
        if asked in row and answered in row:
            prompt = [replace(message, learn=False) for message in _side(row[asked], "user")]
            if asked == "instruction" and row.get("input"):
                prompt[-1] = replace(prompt[-1], content=f"{prompt[-1].content}\n\n{_text(row['input'])}")
            return prompt + _side(row[answered], "assistant")
    raise UserError(f"no known kind of row; one needs {_KINDS}")


def _side(value: Any, role: str) -> list[Message]:
    """A text as one message of `role`, or a list of messages."""
    if isinstance(value, str):
        return [Message(role, _text(value), role == "assistant")]
    if not isinstance(value, list) or not value:
        raise UserError(f"messages are a list of at least one, not {type(value).__name__} {str(value)[:40]}")
    return [_message(number, message) for number, message in enumerate(value, 1)]


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"message {number} is an object with role and content, not {type(message).__name__}")
    named = message.get("role", message.get("from"))
    role = _ALIASES.get(named, named) if isinstance(named, str) else named
    if role not in ROLES:
        raise UserError(f"message {number} has role {named!r}; roles are {', '.join(ROLES)} (or human, gpt)")
    if message.get("tool_calls"):
        raise UserError(f"message {number} has tool_calls, which plain ChatML cannot express; write them as text")
    try:
        content = _text(message.get("content", message.get("value")))
        return Message(role, content, _learned(role, message))
    except UserError as error:
        raise UserError(f"message {number} ({role}): {error}") from error


def _learned(role: str, message: Mapping[str, Any]) -> bool:
    """What the message says about itself; an assistant's is learned unless it says no."""
    answer = role == "assistant"
    for key in ("train", "weight", "loss_weight"):
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise UserError(f'"{key}" is {value!r}; it may be 0 (false) or 1 (true)')
        if value and role != "assistant":
            raise UserError(f'"{key}" is {value!r}, but only what the assistant says is learned')
        answer = answer and bool(value)
    return answer


def _text(content: Any) -> str:
    """Text, or the joined text of a list of parts {"type": "text", "text" | "value": ..}."""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise UserError(f"content is text or a list of text parts, not {type(content).__name__}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"content has a lone surrogate at character {error.start}, which is no text") from error
    return content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return _text(part)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise UserError(f"content has a part of type {kind!r}; only text can be learned from")
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise UserError(f"a text part holds {type(text).__name__} where its text should be")
    return _text(text)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the parsed row) of every row."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; tuning reads a .jsonl file or a .json array of chat rows")
    try:
        with _open(path) as file:
            head = cast(Any, file).peek(256)
            array = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            yield from _array(path, file) if array else _lines(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if packed else open(path, "rb")


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise UserError(f"{where} is longer than {MAX_LINE} bytes")
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield where, _parse(line, where)


def _array(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    text = file.read(MAX_ARRAY + 1)
    if len(text) > MAX_ARRAY:
        raise UserError(f"{path} is a JSON array of more than {MAX_ARRAY} bytes; write it as .jsonl, a row a line")
    for number, row in enumerate(_parse(text, str(path)), 1):
        yield f"{path}, row {number}", row


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"{where} is not JSON: {error}") from error
