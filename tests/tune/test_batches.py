"""The batches of tuning: the same steps for every layout, masks by length, an order of its own for every epoch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from engine.data.chat import END, ChatEncoder
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tune.batches import IGNORE, ChatBatches, head
from engine.tune.encoded import Encoded, Tally, encode_files
from engine.tune.files import read_chats

DATA = Path(os.environ["TRIAX_DATA"]) if os.environ.get("TRIAX_DATA") else None
real_data = pytest.mark.skipif(DATA is None, reason="TRIAX_DATA is not set: the shared test data is elsewhere")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"say {i} " * (i % 5 + 1), "completion": f"it is {i}" * (i % 7 + 1)} for i in range(37)]
    pairs.append({"prompt": "much too long " * 50, "completion": "never learned"})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def encode(path: Path, tokenizer: Tokenizer, seq_len: int = 96) -> tuple[Encoded, Tally]:
    return encode_files([path], ChatEncoder(tokenizer), seq_len)


def test_every_layout_computes_the_same_steps(rows: Path, tokenizer: Tokenizer) -> None:
    def batches(dp: int, rank: int) -> ChatBatches:
        return ChatBatches(encoded, global_batch=8, dp_rank=rank, dp=dp, seed=5)

    encoded = encode(rows, tokenizer)[0]
    one = batches(1, 0)
    for dp in (2, 4):
        ranks = [batches(dp, rank) for rank in range(dp)]
        for step in range(7):
            parts, whole = [rank.step(step) for rank in ranks], one.step(step)
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
            assert np.array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
            assert np.array_equal(np.concatenate([part.lengths for part in parts]), whole.lengths)
            assert whole.tokens.shape[1] % 8 == 0 and whole.tokens.dtype == whole.labels.dtype == np.int64


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(rows: Path, tokenizer: Tokenizer) -> None:
    encoded = encode(rows, tokenizer)[0]
    batches = ChatBatches(encoded, global_batch=8, seed=5)
    size = batches.epoch_size
    epochs = [batches.order(epoch * size, size) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    across = np.concatenate([batches.order(step * 8, 8) for step in range(3 * size // 8)])
    assert np.array_equal(across, np.concatenate(epochs)[: len(across)])
    other = ChatBatches(encoded, global_batch=8, seed=6)
    assert not np.array_equal(other.order(0, size), epochs[0])


def test_labels_are_the_next_learned_tokens_and_padding_goes_by_length(rows: Path, tokenizer: Tokenizer) -> None:
    encoded, tally = encode(rows, tokenizer)
    batches = ChatBatches(encoded, global_batch=37, seed=1)
    assert (tally.rows, tally.dropped, batches.epoch_size) == (38, 1, 37)
    batch, encoder, learned_in_epoch = batches.step(0), ChatEncoder(tokenizer), 0
    order = batches.order(0, 37)
    talks = [chat.messages for chat in read_chats([rows])]  # the row that is dropped is the last
    for i, number in enumerate(order):
        ids, learned = encoder.encode(talks[number])
        n = min(len(ids), 97) - 1
        assert batch.tokens[i, :n].tolist() == ids[:n]
        assert batch.lengths is not None and batch.lengths[i] == n
        expected = [token if yes else IGNORE for token, yes in zip(ids[1 : n + 1], learned[1 : n + 1], strict=True)]
        assert batch.labels[i, :n].tolist() == expected
        assert (batch.labels[i, n:] == IGNORE).all()
        learned_in_epoch += sum(label != IGNORE for label in expected)
    assert learned_in_epoch == encoded.supervised and encoded.tokens == batch.own_lengths().sum()
    assert (batch.labels == tokenizer.token_id(END)).sum() == 37 - tally.truncated
    assert "38 rows, 1 dropped" in tally.summary()


def test_a_run_goes_on_at_its_sample_with_another_global_batch(rows: Path, tokenizer: Tokenizer) -> None:
    encoded = encode(rows, tokenizer)[0]
    eight = ChatBatches(encoded, global_batch=8, seed=1)
    four = ChatBatches(encoded, global_batch=4, seed=1, origin=8 * 9 - 4 * 9)
    both = [four.step(9), four.step(10)]
    whole, width = eight.step(9), max(batch.tokens.shape[1] for batch in both)
    assert whole.tokens.shape[1] == width
    for i, batch in enumerate(both):
        length = batch.tokens.shape[1]
        assert np.array_equal(batch.tokens, whole.tokens[4 * i : 4 * i + 4, :length])


def test_held_back_rows_are_the_files_first_in_order(rows: Path, tokenizer: Tokenizer) -> None:
    encoded = encode(rows, tokenizer)[0]
    batch, talks = head(encoded, 3), [chat.messages for chat in read_chats([rows])]
    for i in range(3):
        ids = ChatEncoder(tokenizer).encode(talks[i])[0][:96]
        assert batch.tokens[i, : len(ids) - 1].tolist() == ids[:-1]
    assert len(head(encoded, 1000).tokens) == len(encoded)


def test_a_long_answer_is_cut_from_the_right(rows: Path, tokenizer: Tokenizer) -> None:
    encoded, tally = encode(rows, tokenizer, 40)
    batches = ChatBatches(encoded, global_batch=8, seed=1)
    assert tally.truncated > 0
    assert max(batches.step(step).tokens.shape[1] for step in range(5)) == 40


def test_nothing_to_learn_is_an_error_that_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "x", "train": false}]}\n')
    with pytest.raises(UserError, match="none of its 1 rows has anything to learn within 96 tokens"):
        encode(path, tokenizer)
    path.write_text("")
    with pytest.raises(UserError, match="holds no row"):
        encode(path, tokenizer)


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
    rows, tally = encode(DATA / "sft" / name, load_tokenizer(str(byte_level)), 512)
    assert tally.rows == count and tally.dropped < count / 10
    assert 0.05 < rows.supervised / rows.tokens < 0.95
    assert (ChatBatches(rows, global_batch=4).step(3).labels != IGNORE).any(axis=1).all()


def said(rows: Encoded, encoder: ChatEncoder) -> list[str]:
    """The text of each row."""
    return [encoder.tokenizer.decode(ids.tolist()) for ids in np.split(rows.ids, rows.starts[1:-1])]


def test_a_split_holds_the_same_rows_back_whatever_their_order_the_seed_and_the_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, byte_level: Path
) -> None:
    pairs = [json.dumps({"question": f"what is {n}?", "answer": f"it is {n}"}) for n in range(40)]
    path, turned = tmp_path / "rows.jsonl", tmp_path / "turned.jsonl"
    path.write_text("\n".join(pairs))
    turned.write_text("\n".join(pairs[::-1]))
    encoder = ChatEncoder(tokenizer)
    learned, held = encode(path, tokenizer)[0].split(0.1)
    assert (len(learned), len(held)) == (36, 4)
    whole = said(encode(path, tokenizer)[0], encoder)
    assert sorted(said(learned, encoder) + said(held, encoder)) == sorted(whole)
    assert said(held, encoder) == [text for text in whole if text in said(held, encoder)], "in the file's order"
    assert set(said(encode(turned, tokenizer)[0].split(0.1)[1], encoder)) == set(said(held, encoder))
    other = encode(path, load_tokenizer(str(byte_level)))[0].split(0.1)[1]
    assert np.array_equal(other.digests, held.digests)
    more = encode(path, tokenizer)[0].split(0.5)[1]
    assert set(held.digests.tolist()) < set(more.digests.tolist()) and len(more) == 20
    assert held.tokens + learned.tokens == encode(path, tokenizer)[0].tokens


def test_rows_that_say_the_same_are_on_one_side_of_a_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    pairs = [json.dumps({"question": f"what is {n % 5}?", "answer": "x"}) for n in range(50)]
    path.write_text("\n".join(pairs))
    for share in (0.01, 0.1, 0.3, 0.5):
        learned, held = encode(path, tokenizer)[0].split(share)
        assert not set(learned.digests.tolist()) & set(held.digests.tolist())
        assert len(learned) + len(held) == 50 and 0 < len(held) <= max(10, share * 50)
    path.write_text("\n".join(pairs[:1] * 9))
    with pytest.raises(UserError, match="--split 0.1 of 9 rows leaves none to learn from"):
        encode(path, tokenizer)[0].split(0.1)


def test_empty_answers_and_keys_that_are_not_read_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    answers = ["a", "", " ", "b"]
    path.write_text("\n".join(json.dumps({"question": "q", "answer": a, "id": n}) for n, a in enumerate(answers)))
    rows, tally = encode(path, tokenizer)
    assert len(rows) == 2 and (tally.rows, tally.dropped, tally.empty) == (4, 2, 2)
    assert "2 empty answers not learned, keys not read: id (4)" in tally.summary()
