"""Rows of every kind as messages; what they say is used, or they are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.chat import Message
from engine.errors import UserError
from engine.tune.files import read_chats
from engine.tune.rows import chat_of

ASKED, ANSWERED = Message("user", "q"), Message("assistant", "a", True)
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TALK}, [ASKED, ANSWERED]),
        ({"messages": json.dumps(TALK)}, [ASKED, ANSWERED]),  # as a table holds it
        (TALK, [ASKED, ANSWERED]),
        (
            {"messages": [{"role": "tool", "content": [{"type": "text", "text": t} for t in "xy"]}]},
            [Message("tool", "xy")],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}]}, [ASKED]),
        ({"messages": [{"role": "user", "content": None, "value": "q"}]}, [ASKED]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASKED, ANSWERED]),
        ({"prompt": "q", "completion": "a"}, [ASKED, ANSWERED]),
        ({"prompt": "q", "response": "a", "id": 3}, [ASKED, ANSWERED]),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "assistant", "content": "a"}]},
            [Message("assistant", "a", False), ANSWERED],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, [ASKED, ANSWERED]),
        ({"instruction": "q", "input": "z", "output": "a"}, [Message("user", "q\n\nz"), ANSWERED]),
        ({"instruction": "q", "input": "[]", "output": "a"}, [Message("user", "q\n\n[]"), ANSWERED]),
        ({"instruction": "", "input": "q", "output": "a"}, [ASKED, ANSWERED]),
        ({"input": "q", "output": "a"}, [ASKED, ANSWERED]),
        ({"messages": None, "prompt": "q", "completion": "a"}, [ASKED, ANSWERED]),
        ({"question": "q", "answer": "a"}, [ASKED, ANSWERED]),
        ({"question": "q", "answer": "a", "system": "s"}, [Message("system", "s"), ASKED, ANSWERED]),
        ({"messages": [{"role": "system", "content": "s"}, *TALK], "system": "s"},
         [Message("system", "s"), ASKED, ANSWERED]),
    ],
)
def test_rows_of_every_kind(row: Any, messages: list[Message]) -> None:
    assert chat_of(row).messages == messages


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}, {"loss_weight": 0.0}, {"weight": 1, "train": False}])
def test_a_message_can_say_that_it_is_not_learned(key: dict[str, Any]) -> None:
    turns = [{"role": "assistant", "content": "no", **key}, {"role": "assistant", "content": "yes", "weight": 1}]
    assert [message.learn for message in chat_of({"messages": turns}).messages] == [False, True]


@pytest.mark.parametrize("empty", ["", "  \n", None, []])
def test_an_empty_answer_is_context_and_counted_not_learned(empty: Any) -> None:
    chat = chat_of({"messages": [*TALK, {"role": "assistant", "content": empty, "weight": 1}]})
    assert [message.learn for message in chat.messages] == [False, True, False]
    assert chat.empty_answers == 1
    assert chat_of({"question": "q", "answer": empty}).empty_answers == 1


OF_MESSAGES = {"reasoning_content": "hm", "thinking": "hm", "function_call": {"name": "f", "arguments": "{}"},
               "tool_calls": [{"type": "function"}], "audio": {"id": "x y"}, "refusal": "no", "mask": 0,
               "citations": [{"title": "x\ny"}]}
OF_ROWS = {"tools": "[{}, 1]", "functions": [{"name": "f"}], "images": ["a.png"], "image_url": "http://x/a.png",
           "context": "c", "history": [["x", "y"]], "choices": ["x", "y"], "chosen": "c", "rejected": [{"x": "y"}],
           "system_prompt": "s", "passage": "p", "source": "three\npages", "response": "another", "prompt": "other"}


@pytest.mark.parametrize("key", OF_MESSAGES)
def test_what_a_message_says_besides_is_refused_by_name_and_can_be_left_out(key: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: OF_MESSAGES[key]}]}
    with pytest.raises(UserError, match=rf'^message 2 \(assistant\): "{key}" holds content.*--ignore-keys {key}$'):
        chat_of(row)
    chat = chat_of(row, [key])
    assert (chat.messages, chat.unused) == ([ASKED, ANSWERED], {key})
    for nothing in (None, "", [], {}, [""], {"x": None}):
        row["messages"][1][key] = nothing
        assert (chat_of(row).messages, chat_of(row).unused) == ([ASKED, ANSWERED], set())


@pytest.mark.parametrize("key", OF_ROWS)
def test_what_a_row_says_besides_is_refused_by_name_and_can_be_left_out(key: str) -> None:
    row = {"question": "q", "answer": "a", key: OF_ROWS[key]}
    if key in ("response", "prompt"):  # of two answers or questions one would be lost
        row = {"messages": TALK, key: OF_ROWS[key]}
    with pytest.raises(UserError, match=rf'^"{key}" holds content.*--ignore-keys {key}$'):
        chat_of(row)
    chat = chat_of(row, [key])
    assert (chat.messages, chat.unused) == ([ASKED, ANSWERED], {key})


def test_all_keys_that_are_refused_are_named_at_once() -> None:
    with pytest.raises(UserError, match='^"context", "choices" hold content.*--ignore-keys context,choices$'):
        chat_of({"question": "q", "answer": "a", "context": "c", "id": 1, "choices": [1]})
    with pytest.raises(UserError, match=r'"k0".* and 92 more hold content') as caught:
        chat_of({"question": "q", "answer": "a", **{f"k{n}": "x" for n in range(100)}})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", [
    {"id": "x"}, {"source": "wiki"}, {"category": "qa"}, {"prompt_id": "7f"}, {"conversationId": "7f"}, {"score": 0.5},
    {"is_classification": False}, {"length": 17}, {"Unnamed: 0": "4"}, {"metadata": {"lang": "en", "n": 3}},
    {"tags": ["a", "b"]}, {"url": "https://" + "x" * 500}, {"query": "q"}, {"text": "### q\n### a"}, {"text": "q"},
    {"": 3}, {"metadata": {"author": "Ann", "source": "two words"}}, {"hash": b"\xff" * 32},
])
def test_what_describes_a_row_or_repeats_it_is_not_read_and_said(key: dict[str, Any]) -> None:
    chat = chat_of({"question": "q", "answer": "a", **key})
    assert (chat.messages, chat.unused) == ([ASKED, ANSWERED], key.keys())


@pytest.mark.parametrize("key", [
    {"": "A paragraph without a column's name."}, {"Unnamed: 2": "A paragraph."}, {"hash": b"\x89PNG" * 100},
    {"metadata": {"reasoning_content": "think first"}}, {"meta": {"lang": "en", "extra": {"context": "A paragraph."}}},
    {"context": "All of q is said in a."},
])
def test_content_under_the_name_of_a_label_or_that_quotes_the_row_is_refused(key: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f'"{next(iter(key))}" holds content'):
        chat_of({"question": "q", "answer": "a", **key})


def test_the_weight_of_a_whole_row_may_be_one_in_any_spelling_or_nothing() -> None:
    for weight in ({"weight": "1"}, {"weight": ""}, {"train": "True"}, {"loss_weight": 1.0}, {"train": None}):
        assert chat_of({"question": "q", "answer": "a", **weight}).messages == [ASKED, ANSWERED]


def test_an_input_is_never_put_into_the_mouth_of_the_assistant() -> None:
    with pytest.raises(UserError, match='"input" follows what the user says.*ends with a message of assistant'):
        chat_of({"instruction": TALK, "input": "i", "output": "o"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "t", "id": 1}, r"no known kind of row.*keys: text, id"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has role 'robot'; roles are system, user"),
        ({"messages": [{"content": "x"}]}, "message 1 has role None"),
        ({"messages": []}, '"messages" holds no message'),
        ({"messages": "x"}, '"messages" is a list of messages, not the text x'),
        ({"messages": {"role": "user", "content": "x"}}, '"messages" is a list of messages, not an object'),
        ({"messages": ["x"]}, "message 1 is the text x; messages are objects"),
        ({"messages": [{"role": "user", "contents": "x"}]}, r'message 1 \(user\): "contents" holds content'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "value": "y"}]}]}, '"value" holds'),
        ({"messages": [{"role": "user", "content": {"x": 1}}]}, "content is text or a list of text parts, not an obj"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, '"weight" is 0.5'),
        ({"messages": [{"role": "user", "content": "x", "train": True}]}, "only what the assistant says"),
        ({"messages": TALK, "train": False}, '"train" is False and stands beside a whole row'),
        ({"question": "x", "answer": 4.5}, "not the number 4.5"),
        ({"question": "x", "answer": ["y", "z"]}, "message 1 is the text y"),
        ({"question": "\ud800", "answer": "x"}, "lone surrogate at character 0"),
        (1, "a row is an object, not the number 1"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_keys(tmp_path: Path, row: Any, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"(?s)rows\.jsonl, line 3: .*{said}"):
        list(read_chats([path]))
