"""One row of tuning data, of any of the usual kinds, as messages. A bad row is refused by name, never skipped.

Kinds, told apart row by row by their keys:
    messages | conversations                    role, content or from, value; content is text or a list of text parts
    a question and its answer                   prompt, instruction, question or input, with completion, response,
                                                output or answer; each text or a list of messages
"input" beside an instruction follows it after an empty line; "system" is the first message. In a message, "train":
false, "weight": 0 or "loss_weight": 0 says that it is context only. What other keys may hold: engine/tune/keys.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from engine.data.chat import Message
from engine.errors import UserError, shown
from engine.tune.keys import is_nothing, unused_keys

ROLES = ("system", "user", "assistant", "tool")
ALIASES: Mapping[str, str] = MappingProxyType({
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "developer": "system", "ipython": "tool", "observation": "tool",
    "function": "tool"})
"""Other people's names of roles."""
LISTS = ("messages", "conversations")
ASKED = ("prompt", "instruction", "question", "input")
ANSWERED = ("completion", "response", "output", "answer")
WEIGHTS = ("train", "weight", "loss_weight")
"""Beside a message: whether it is learned."""
KINDS = f"{' or '.join(LISTS)}, or one of {', '.join(ASKED)} with one of {', '.join(ANSWERED)}"


@dataclass(frozen=True)
class Chat:
    """A conversation, and the keys of its row that hold something and were not read: they describe it, or repeat it, or
    the user leaves them out."""

    messages: list[Message]
    unused: frozenset[str] = frozenset()

    @property
    def empty_answers(self) -> int:
        """Answers without a word. They are not learned: they would teach to end a turn before it begins."""
        return sum(message.role == "assistant" and not message.content.strip() for message in self.messages)


def chat_of(row: Any, ignored: Collection[str] = ()) -> Chat:
    """The conversation in a row: an object of a known kind, or a list of messages. `ignored` keys are as if absent.
    Raises UserError saying what is wrong with it."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise UserError(f"a row is an object, not {_kind(row)}")
    found = {key: value for key, value in row.items() if key not in ignored}
    asked, answered = _keys_read(found)
    read = {asked, answered} - {""}
    if asked == "instruction" and "input" in found:
        read.add("input")
    for key in WEIGHTS:
        value = found.get(key)
        whole = value in (1, "1", "1.0") or str(value).lower() == "true"  # a table of text has no numbers
        if not whole and not is_nothing(value):
            raise UserError(f'"{key}" is {shown(value, 40)} and stands beside a whole row; only a message '
                            "can have it")
    unused = unused_keys(row, {*read, "system", *WEIGHTS}, ignored, of_row=True, whole=[found[key] for key in read])
    messages = _side(found[asked] if answered else _list(asked, found[asked]), "user", ignored, unused)
    if answered:
        messages = [replace(message, learn=False) for message in messages]
        if "input" in read - {asked} and not is_nothing(found["input"]):
            if messages[-1].role != "user":
                raise UserError(f'"input" follows what the user says, and "{asked}" ends with a message of '
                                f"{messages[-1].role}; write it into the messages")
            messages[-1] = replace(messages[-1], content=f"{messages[-1].content}\n\n{_text(found['input'])}")
        messages += _side(found[answered], "assistant", ignored, unused)
    return Chat(_with_system(found.get("system"), messages), frozenset(unused))


def _keys_read(row: Mapping[str, Any]) -> tuple[str, str]:
    """(key of the messages, "") or (key of the question, key of the answer); the first that hold something."""
    for key in LISTS:
        if key in row and not is_nothing(row[key]):
            return key, ""
    pair = [next((key for key in keys if not is_nothing(row.get(key))), next((key for key in keys if key in row), ""))
            for keys in (ASKED, ANSWERED)]
    if all(pair):
        return pair[0], pair[1]
    emptied = [key for key in LISTS if key in row]
    if emptied:
        raise UserError(f'"{emptied[0]}" holds no message')
    plain = '; plain text is for engine.pretrain, after tools/preprocess_data.py' if "text" in row else ""
    raise UserError(f"no known kind of row; one needs {KINDS}{plain}")


def _with_system(system: Any, messages: list[Message]) -> list[Message]:
    """The messages, behind the row's own system message unless they begin with the same one."""
    if is_nothing(system):
        return messages
    text = _text(system)
    if messages[0].role != "system":
        return [Message("system", text), *messages]
    if messages[0].content.strip() != text.strip():
        raise UserError('"system" and the first message are two system messages that differ; join them, or leave one '
                        "out with --ignore-keys system")
    return messages


def _list(key: str, value: Any) -> list[Any]:
    """The messages of a conversation; a table holds them as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = value
    if not isinstance(found, list):
        raise UserError(f'"{key}" is a list of messages, not {_kind(found)}')
    return found


def _side(value: Any, role: str, ignored: Collection[str], unused: set[str]) -> list[Message]:
    """A text as one message of `role`, or a list of messages; adds to `unused`."""
    if isinstance(value, list) and value:
        return [_message(number, message, ignored, unused) for number, message in enumerate(value, 1)]
    if isinstance(value, Mapping):
        raise UserError(f"messages are text or a list of messages, not an object with {_names(value)}")
    text = _text(value)
    return [Message(role, text, role == "assistant" and bool(text.strip()))]


def _message(number: int, message: Any, ignored: Collection[str], unused: set[str]) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"message {number} is {_kind(message)}; messages are objects with role and content")
    found = {key: value for key, value in message.items() if key not in ignored}
    says, speaks = _first_held(found, ("content", "value")), _first_held(found, ("role", "from"))
    named = found.get(speaks)
    lower = named.strip().lower() if isinstance(named, str) else ""
    role = ALIASES.get(lower, lower)
    if role not in ROLES:
        raise UserError(f"message {number} has role {shown(repr(named), 80)}; roles are {', '.join(ROLES)} (or "
                        f"{', '.join(ALIASES)})")
    try:
        unused |= unused_keys(message, {speaks, says, *WEIGHTS}, ignored)
        content = _text(found.get(says), unused, ignored)
        return Message(role, content, _learned(role, found) and bool(content.strip()))
    except UserError as error:
        raise UserError(f"message {number} ({role}): {error}") from error


def _first_held(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The first of the keys that holds something, else the first."""
    return next((key for key in keys if not is_nothing(fields.get(key))), keys[0])


def _learned(role: str, message: Mapping[str, Any]) -> bool:
    """What the message says about itself; an assistant's is learned unless it says no."""
    answer = role == "assistant"
    for key in WEIGHTS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise UserError(f'"{key}" is {shown(repr(value), 80)}; it may be 0 (false) or 1 (true)')
        if value and role != "assistant":
            raise UserError(f'"{key}" is {value!r}, but only what the assistant says is learned')
        answer = answer and bool(value)
    return answer


def _text(content: Any, unused: set[str] | None = None, ignored: Collection[str] = ()) -> str:
    """Text; the digits of a whole number; nothing for null and for NaN, which is how tables write an empty cell of a
    column of text; or the joined text of a list of parts. Adds to `unused`."""
    if content is None or content != content:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, set() if unused is None else unused, ignored) for part in content)
    if type(content) is int:
        return str(content)
    if not isinstance(content, str):
        raise UserError(f"content is text or a list of text parts, not {_kind(content)}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"content has a lone surrogate at character {error.start}, which is no text") from error
    return content


def _part(part: Any, unused: set[str], ignored: Collection[str]) -> str:
    if isinstance(part, str):
        return _text(part)
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    if kind != "text":
        raise UserError(f"content has a part of type {shown(repr(kind), 80)}; only text can be learned from")
    held = _first_held(part, ("text", "value"))
    if not isinstance(part.get(held), str):
        raise UserError(f"a text part holds {_kind(part.get(held))} where its text should be")
    unused |= unused_keys(part, {"type", held}, ignored)
    return _text(part[held])


def _kind(value: Any) -> str:
    """A value as messages name it."""
    if value is None or isinstance(value, (bool, list)):
        return "null" if value is None else "true or false" if isinstance(value, bool) else "a list"
    kind = {dict: "an object", str: "the text", int: "the number", float: "the number"}.get(type(value))
    told = f" {shown(value, 40)}" if isinstance(value, (str, int, float)) else ""
    return f"{kind or type(value).__name__}{told}"


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(shown(key, 40) for key in list(fields)[:8]) or "no keys"
