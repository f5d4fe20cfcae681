"""Rows of every kind as messages; bad ones are refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.chat import Message
from engine.errors import UserError
from engine.tune import rows as chat_rows
from engine.tune.rows import messages_of, read_chats

ASKED, ANSWERED = Message("user", "q"), Message("assistant", "a", True)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [ASKED, ANSWERED]),
        (
            {"messages": [{"role": "tool", "content": [{"type": "text", "text": t} for t in "xy"]}]},
            [Message("tool", "xy")],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}]}, [ASKED]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASKED, ANSWERED]),
        ({"prompt": "q", "completion": "a"}, [ASKED, ANSWERED]),
        ({"prompt": "q", "response": "a", "id": 3}, [ASKED, ANSWERED]),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "assistant", "content": "a"}]},
            [Message("assistant", "a", False), ANSWERED],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, [ASKED, ANSWERED]),
        ({"instruction": "q", "input": "z", "output": "a"}, [Message("user", "q\n\nz"), ANSWERED]),
        ({"question": "q", "answer": "a"}, [ASKED, ANSWERED]),
        ({"question": "q", "answer": "a", "system": "s"}, [Message("system", "s"), ASKED, ANSWERED]),
    ],
)
def test_rows_of_every_kind(row: dict[str, Any], messages: list[Message]) -> None:
    assert messages_of(row) == messages


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}, {"loss_weight": 0.0}, {"weight": 1, "train": False}])
def test_a_message_can_say_that_it_is_not_learned(key: dict[str, Any]) -> None:
    turns = [{"role": "assistant", "content": "no", **key}, {"role": "assistant", "content": "yes", "weight": 1}]
    assert [message.learn for message in messages_of({"messages": turns})] == [False, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "t", "id": 1}, r"no known kind of row.*keys: text, id"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has role 'robot'; roles are system, user"),
        ({"messages": [{"content": "x"}]}, "message 1 has role None"),
        ({"messages": []}, "at least one"),
        ({"messages": ["x"]}, "message 1 is an object"),
        ({"messages": [{"role": "user"}]}, r"message 1 \(user\): content is text.*NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, '"weight" is 0.5'),
        ({"messages": [{"role": "user", "content": "x", "train": True}]}, "only what the assistant says"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool_calls"),
        ({"question": "x", "answer": 42}, "not int 42"),
        ({"question": "\ud800", "answer": "x"}, "lone surrogate at character 0"),
        ([1], "a row is an object, not list"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_keys(tmp_path: Path, row: Any, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"(?s)rows\.jsonl, line 3: .*{said}"):
        list(read_chats(path))


def test_files_are_told_by_content(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    for name, content in {"a.jsonl": lines, "b.json": lines, "c.json": json.dumps(rows, indent=1), "d": lines}.items():
        for packed in (False, True):
            data = b"\xef\xbb\xbf" + content.encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
            assert [row[0].content for row in read_chats(tmp_path / name)] == ["q0", "q1", "q2"]


def test_damaged_files_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.dumps({"question": "q", "answer": "a" * 50}).encode()
    path = tmp_path / "rows.jsonl"
    cases = {
        "rows.jsonl, line 2 is not JSON": good + b"\n{nope\n",
        "line 1 is not JSON.*utf-8": b'{"a": "\xff"}',
        "damaged or cut short": gzip.compress((good + b"\n") * 1000)[:-20],
        "line 1 is nested too deeply": b'{"a": ' + b"[" * 200_000,
        "rows.jsonl is not JSON": b"[" + good,
        "line 2 is longer than 100 bytes": good + b"\n" + b" " * 200,
    }
    monkeypatch.setattr(chat_rows, "MAX_LINE", 1 << 20)
    for said, content in cases.items():
        path.write_bytes(content)
        if "longer" in said:
            monkeypatch.setattr(chat_rows, "MAX_LINE", 100)
        with pytest.raises(UserError, match=said):
            list(read_chats(path))
    with pytest.raises(UserError, match="is not a file"):
        list(read_chats(tmp_path / "none"))
