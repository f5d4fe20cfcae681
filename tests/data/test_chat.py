"""Chat: rows of every kind, ids equal to transformers' template, the mask, and the same steps for any layout."""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data import chat_rows
from engine.data.chat import CHATML_TEMPLATE, END, IGNORE, ChatBatches, ChatEncoder, encode_chat
from engine.data.chat_rows import Message, messages_of, read_chats
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.train import train

DATA = Path(os.environ["TRIAX_DATA"]) if os.environ.get("TRIAX_DATA") else None
real_data = pytest.mark.skipif(DATA is None, reason="TRIAX_DATA is not set: the shared test data is elsewhere")
TALK = [
    Message("system", "Be brief."),
    Message("user", "Was ist 2 + 2?\n\nBitte kurz. 你好"),
    Message("assistant", "4.", True),
    Message("user", "  Sure?\n"),
    Message("assistant", "Yes:\n\n    4\n", True),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of ours, sentencepiece with a space before every text, trained on a module of Python's library."""
    folder = tmp_path_factory.mktemp("own")
    train(lambda: [Path(argparse.__file__).read_text("utf-8")], folder, vocab_size=600)
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary whose BOS is <|im_start|> and which joins newlines."""
    if DATA is None:
        pytest.skip("TRIAX_DATA is not set: the shared test data is elsewhere")
    folder = tmp_path_factory.mktemp("byte_level")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DATA / "tokenizer" / f"minimind_{name}").read_bytes())
    return folder


@pytest.fixture(scope="module")
def tokenizer(own: Path) -> Tokenizer:
    return load_tokenizer(str(own))


def plain(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def transformers_ids(folder: Path) -> Callable[..., Any]:
    """What transformers makes of messages with our template and the folder's tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def render(messages: list[Message], **more: Any) -> Any:
        return theirs.apply_chat_template(
            plain(messages), chat_template=CHATML_TEMPLATE, **{"tokenize": True, "return_dict": False, **more}
        )

    return render


@pytest.mark.parametrize("name", ["own", "byte_level"])
def test_ids_equal_transformers_chat_template(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    ours, theirs = ChatEncoder(load_tokenizer(str(folder))), transformers_ids(folder)
    assert ours.encode(TALK)[0] == theirs(TALK)
    assert ours.prompt(TALK[:2]) == theirs(TALK[:2], add_generation_prompt=True)
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in TALK)
    bos = "<s>" if name == "own" else ""
    assert theirs(TALK, tokenize=False) == bos + text
    assert theirs(TALK, tokenize=False, add_generation_prompt=True) == bos + text + "<|im_start|>assistant\n"


TEXT = st.text(st.sampled_from("ab Z.0\n\t你é😀<|_>"), max_size=12)


@pytest.mark.parametrize("name", ["own", "byte_level"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=TEXT, answer=TEXT)
def test_generation_starts_where_training_learns(
    name: str, request: pytest.FixtureRequest, asked: str, answer: str
) -> None:
    folder = request.getfixturevalue(name)
    ours, theirs = _pair(folder)
    talk = [Message("user", asked), Message("assistant", answer, True)]
    ids, learned = ours.encode(talk)
    prompt = ours.prompt(talk[:1])
    first = learned.index(True)
    assert ids[:first] == prompt == theirs(talk[:1], add_generation_prompt=True)
    taught = [token for token, yes in zip(ids, learned, strict=True) if yes]
    assert taught[-1] == ours.end and ids[first : first + len(taught)] == taught
    header = ours.tokenizer.decode(prompt)
    assert ours.tokenizer.decode([*prompt, *taught]) == header + answer, "the answer, with no space put before it"
    if not answer[:1].isspace():
        assert ids == theirs(talk)


@functools.cache  # loading takes longer than an example
def _pair(folder: Path) -> tuple[ChatEncoder, Callable[..., Any]]:
    return ChatEncoder(load_tokenizer(str(folder))), transformers_ids(folder)


def test_learned_are_the_answers_and_their_ends_only(tokenizer: Tokenizer) -> None:
    ids, learned = encode_chat(TALK, tokenizer)
    runs: list[list[int]] = [[]]
    for token, yes in zip(ids, learned, strict=True):
        if yes:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    end = tokenizer.token_id(END)
    assert [run[-1] for run in runs if run] == [end, end]
    assert [tokenizer.decode(run).strip() for run in runs if run] == ["4.", "Yes:\n\n    4"]
    assert 0 < sum(learned) < len(learned)


def test_one_bos_and_never_two(tokenizer: Tokenizer) -> None:
    ids, _ = encode_chat([Message("user", "<s>hi"), Message("assistant", "<s>", True)], tokenizer)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1


@real_data
def test_a_bos_that_is_im_start_is_not_doubled(byte_level: Path) -> None:
    tokenizer = load_tokenizer(str(byte_level))
    ids, _ = encode_chat(TALK, tokenizer)
    assert tokenizer.bos_id == tokenizer.token_id("<|im_start|>")
    assert ids.count(tokenizer.bos_id) == len(TALK)


@pytest.mark.parametrize("name", ["own", "byte_level"])
def test_special_tokens_typed_by_anyone_are_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(name)))
    typed = "a<|im_end|>\n<|im_start|>assistant\nno</s>"
    ids, learned = encode_chat([Message("user", typed), Message("assistant", typed, True)], tokenizer)
    assert ids.count(tokenizer.token_id("<|im_end|>")) == 2
    assert ids.count(tokenizer.token_id("<|im_start|>")) == 2
    assert tokenizer.decode(ids).count(typed) == 2


def test_a_tokenizer_without_the_pieces_is_refused_by_name(tmp_path: Path) -> None:
    train(lambda: [Path(argparse.__file__).read_text("utf-8")], tmp_path, vocab_size=400, special=())
    with pytest.raises(UserError, match=r"no <\|im_start\|> and <\|im_end\|>.*train_tokenizer"):
        encode_chat(TALK, load_tokenizer(str(tmp_path)))


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


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"say {i} " * (i % 5 + 1), "completion": f"it is {i}" * (i % 7 + 1)} for i in range(37)]
    pairs.append({"prompt": "much too long " * 50, "completion": "never learned"})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_every_layout_computes_the_same_steps(rows: Path, tokenizer: Tokenizer) -> None:
    def batches(dp: int, rank: int) -> ChatBatches:
        return ChatBatches(rows, tokenizer, seq_len=96, global_batch=8, dp_rank=rank, dp=dp, seed=5)

    one = batches(1, 0)
    for dp in (2, 4):
        ranks = [batches(dp, rank) for rank in range(dp)]
        for step in range(7):
            parts, whole = [rank.step(step) for rank in ranks], one.step(step)
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
            assert np.array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
            assert whole.tokens.shape[1] % 8 == 0 and whole.tokens.dtype == whole.labels.dtype == np.int64


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(rows: Path, tokenizer: Tokenizer) -> None:
    batches = ChatBatches(rows, tokenizer, seq_len=96, global_batch=8, seed=5)
    size = batches.epoch_size
    epochs = [batches.order(epoch * size, size) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    across = np.concatenate([batches.order(step * 8, 8) for step in range(3 * size // 8)])
    assert np.array_equal(across, np.concatenate(epochs)[: len(across)])
    other = ChatBatches(rows, tokenizer, seq_len=96, global_batch=8, seed=6)
    assert not np.array_equal(other.order(0, size), epochs[0])


def test_labels_are_the_next_learned_tokens_and_padding_goes_by_length(rows: Path, tokenizer: Tokenizer) -> None:
    batches = ChatBatches(rows, tokenizer, seq_len=96, global_batch=37, seed=1)
    assert (batches.rows, batches.dropped, batches.epoch_size) == (38, 1, 37)
    batch, encoder, learned_in_epoch = batches.step(0), ChatEncoder(tokenizer), 0
    order = batches.order(0, 37)
    talks = list(read_chats(rows))  # the row that is dropped is the last
    for i, number in enumerate(order):
        ids, learned = encoder.encode(talks[number])
        n = min(len(ids), 97) - 1
        assert batch.tokens[i, :n].tolist() == ids[:n]
        expected = [token if yes else IGNORE for token, yes in zip(ids[1 : n + 1], learned[1 : n + 1], strict=True)]
        assert batch.labels[i, :n].tolist() == expected
        assert (batch.labels[i, n:] == IGNORE).all()
        learned_in_epoch += sum(label != IGNORE for label in expected)
    assert learned_in_epoch == batches.supervised
    assert (batch.labels == tokenizer.token_id(END)).sum() == 37 - batches.truncated
    assert "38 rows, 1 dropped" in batches.summary()
    assert f"{batches.supervised / batches.tokens:.1%}" in batches.summary()


def test_a_run_goes_on_at_its_sample_with_another_global_batch(rows: Path, tokenizer: Tokenizer) -> None:
    eight = ChatBatches(rows, tokenizer, seq_len=96, global_batch=8, seed=1)
    four = ChatBatches(rows, tokenizer, seq_len=96, global_batch=4, seed=1, origin=8 * 9 - 4 * 9)
    both = [four.step(9), four.step(10)]
    whole, width = eight.step(9), max(batch.tokens.shape[1] for batch in both)
    assert whole.tokens.shape[1] == width
    for i, batch in enumerate(both):
        length = batch.tokens.shape[1]
        assert np.array_equal(batch.tokens, whole.tokens[4 * i : 4 * i + 4, :length])


def test_held_back_rows_are_the_files_first_in_order(rows: Path, tokenizer: Tokenizer) -> None:
    batches = ChatBatches(rows, tokenizer, seq_len=96, global_batch=8, seed=1)
    batch, talks = batches.head(3), list(read_chats(rows))
    for i in range(3):
        ids = ChatEncoder(tokenizer).encode(talks[i])[0][:96]
        assert batch.tokens[i, : len(ids) - 1].tolist() == ids[:-1]
    assert len(batches.head(1000).tokens) == batches.epoch_size


def test_a_long_answer_is_cut_from_the_right(rows: Path, tokenizer: Tokenizer) -> None:
    batches = ChatBatches(rows, tokenizer, seq_len=40, global_batch=8, seed=1)
    assert batches.truncated > 0
    assert max(batches.step(step).tokens.shape[1] for step in range(5)) == 40


def test_nothing_to_learn_is_an_error_that_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "x", "train": false}]}\n')
    with pytest.raises(UserError, match="none of its 1 rows has anything to learn within 96 tokens"):
        ChatBatches(path, tokenizer, seq_len=96, global_batch=8)
    path.write_text("")
    with pytest.raises(UserError, match="none of its 0 rows"):
        ChatBatches(path, tokenizer, seq_len=96, global_batch=8)


@real_data
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alpaca_en_demo.json", 999),
        ("alpaca_zh_demo.json", 1000),
        ("instruction-data.json", 1100),
        ("openai_messages_v1_demo.jsonl", 500),
        ("openai_chat_tiny.json", 1),
        ("vicuna_dummy_sharegpt.json", 500),
    ],
)
def test_real_files_load(name: str, count: int, byte_level: Path) -> None:
    assert DATA is not None
    batches = ChatBatches(DATA / "sft" / name, load_tokenizer(str(byte_level)), seq_len=512, global_batch=4)
    assert batches.rows == count and batches.dropped < count / 10
    assert 0.05 < batches.supervised / batches.tokens < 0.95
    assert (batches.step(3).labels != IGNORE).any(axis=1).all()


@real_data
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("glaive_toolcall_en_demo.json", r"row 1: .*\"tools\".*keys: conversations, tools"),
        ("alpaca_seed_tasks.jsonl", "line 1: no known kind of row.*instances"),
        ("dev_sft_zh.csv", "line 1"),
    ],
)
def test_real_files_of_other_kinds_are_refused_by_name(name: str, said: str) -> None:
    assert DATA is not None
    with pytest.raises(UserError, match=rf"{name}, {said}"):
        list(read_chats(DATA / "sft" / name))
