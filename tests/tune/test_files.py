"""Files of rows: any arrangement of JSON, tables, packed or not; damaged ones are one clear line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.tune import files
from engine.tune.files import chat_files, read_chats

DATA = Path(os.environ["TRIAX_DATA"]) if os.environ.get("TRIAX_DATA") else None
real_data = pytest.mark.skipif(DATA is None, reason="TRIAX_DATA is not set: the shared test data is elsewhere")
ROWS = [{"question": f"q{i}, \"x\"\ny", "answer": "a"} for i in range(3)]
QUESTIONS = [row["question"] for row in ROWS]


def questions(path: Path) -> list[str]:
    return [chat.messages[0].content for chat in read_chats([path])]


def table(delimiter: str) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerow(["", "question", "answer", "context"])
    writer.writerows([str(number), *row.values(), ""] for number, row in enumerate(ROWS))
    return sink.getvalue()


CONTENTS: Mapping[str, str] = {
    "a.jsonl": "".join(json.dumps(row) + "\r\n" for row in ROWS), "lines.json": "\n\n".join(map(json.dumps, ROWS)),
    "array.json": json.dumps(ROWS, indent=1), "pretty": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "data.json": json.dumps({"version": "1", "data": ROWS}), "a.csv": table(","), "b.TSV": table("\t")}
PACKINGS: Mapping[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", CONTENTS)
def test_files_are_told_by_content(tmp_path: Path, name: str, packing: str) -> None:
    for data in (CONTENTS[name].encode(), b"\xef\xbb\xbf" + CONTENTS[name].encode(), CONTENTS[name].encode("utf-16")):
        path = tmp_path / f"{name}{packing}"
        path.write_bytes(PACKINGS[packing](data))
        assert questions(path) == QUESTIONS
    if packing and not name.lower().endswith(("csv", "tsv")):  # its name need not say that it is packed
        assert questions(path.rename(tmp_path / name)) == QUESTIONS


def test_parquet_is_read_with_its_lists_of_messages(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    talks = [[{"role": "user", "content": q, "name": None}, {"role": "assistant", "content": "a", "name": None}]
             for q in QUESTIONS]
    parquet.write_table(pyarrow.table({"messages": talks, "tools": [None, None, None], "id": [1, 2, 3]}),
                        tmp_path / "a.parquet", row_group_size=2)
    assert questions(tmp_path / "a.parquet") == QUESTIONS
    parquet.write_table(pyarrow.table({"messages": talks, "tools": [None, None, "f"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r'b\.parquet, row 3: "tools" holds content'):
        questions(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    whole = (tmp_path / "a.parquet").read_bytes()
    for content, words in (
        (whole[:-9], rf"c\.parquet is cut short: .* its {len(whole) - 9:,} bytes do not end as one"),
        (b"\0" * 100 + whole[100:], r"c\.parquet is no Parquet file: it begins with b'"),
        (b"<!DOCTYPE html>", r"c\.parquet is no Parquet file: it is a web page"),
        (whole[:4] + b"\xff" * 60 + whole[64:], r"c\.parquet: cannot be read: the Parquet file is damaged, or"),
        (whole[:-30] + b"\xff" * 20 + whole[-10:], r"c\.parquet: cannot be read: the Parquet file is damaged, or"),
    ):
        (tmp_path / "c.parquet").write_bytes(content)
        with pytest.raises(UserError, match=words):
            questions(tmp_path / "c.parquet")


@pytest.mark.parametrize(("name", "content", "what"), [
    ("a.jsonl", b"", r"it is empty \(0 bytes\)"), ("a.jsonl.gz", b"", r"it is empty \(0 bytes\)"),
    ("a.csv", b"", r"it is empty \(0 bytes\)"), ("a.parquet", b"", r"it is empty \(0 bytes\)"),
    ("a.jsonl", b"\n\n \n", "in 4 bytes are blanks"), ("a.jsonl", b"\xef\xbb\xbf", "in 3 bytes are blanks"),
    ("a.json", b"[]", "in 2 bytes are blanks, an empty list"), ("a.json", b'{"data": []}', "in 12 bytes are"),
    ("a.csv", b"question,answer\n", "in 16 bytes are .*a table without rows"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), "in 20 bytes are blanks"),
])  # fmt: skip
def test_a_file_without_a_row_is_refused_for_that_also_beside_others(tmp_path: Path, name: str, content: bytes,
                                                                     what: str) -> None:
    full, path = tmp_path / "full.jsonl", tmp_path / name
    full.write_text(CONTENTS["a.jsonl"])
    path.write_bytes(content)
    for paths in ([path], [full, path], [path, full]):
        with pytest.raises(UserError, match=f"{name} holds no row: {what}.*; tuning reads JSON"):
            list(read_chats(paths))


def test_words_that_tables_take_for_an_empty_cell_are_text(tmp_path: Path) -> None:
    """pandas reads each of them as NaN; somebody asked for it, and somebody answered."""
    words = ["nan", "NaN", "null", "NULL", "NA", "N/A", "#N/A", "None", "-nan", "inf", "true", "007", "1e5", "1_000",
             " padded ", "[]", "{}", "0"]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "answer", "system"], *([word, word, word] for word in words)])
    found = [[message.content for message in chat.messages] for chat in read_chats([tmp_path / "a.csv"])]
    assert found == [[word] * 3 for word in words]


def test_a_cell_that_is_empty_is_no_text(tmp_path: Path) -> None:
    """NaN itself, as pandas leaves it in JSON and in Parquet, is like null: an empty question, an empty answer."""
    (tmp_path / "a.jsonl").write_text('{"question": NaN, "answer": "a"}\n{"question": "q", "answer": NaN}\n'
                                      '{"messages": [{"role": "user", "content": NaN}, {"role": "assistant", '
                                      '"content": "b"}]}\n')
    chats = list(read_chats([tmp_path / "a.jsonl"]))
    assert [[message.content for message in chat.messages] for chat in chats] == [["", "a"], ["q", ""], ["", "b"]]
    assert [chat.empty_answers for chat in chats] == [0, 1, 0]


def test_an_array_is_read_one_row_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW", 1 << 17)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question": f"q{i} " * 100, "answer": "a"} for i in range(5000)]))
    assert path.stat().st_size > 10 << 17
    assert len(questions(path)) == 5000


GOOD = json.dumps({"question": "q", "answer": "a" * 50}).encode()


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", GOOD + b"\n{nope\n", "a.jsonl, line 2: not JSON: Expecting property name"),
    ("a.jsonl", GOOD + b"\n{nope\n" + (GOOD + b"\n") * 5000, "a.jsonl, line 2: not JSON: Expecting property name"),
    *(("a.jsonl", GOOD + b"\n" + GOOD[:cut], "a.jsonl, line 2: not JSON: .*; the file ends within this value: it "
       "may be cut short") for cut in (-1, -9, 13, 12, 1)),
    ("a.jsonl", GOOD[:-1] + b"\n" + GOOD, r"line 1: not JSON: Expecting ',' delimiter \(on line 2\)"),
    ("a.jsonl", b'{"question": "\xff", "answer": "a"}', "line 1: the row holds bytes that are not UTF-8"),
    ("a.jsonl", b'{"question": "q", "answer": "a", "answer": "b"}', 'line 1: the key "answer" is twice in one object'),
    ("a.jsonl", b'{"a": ' + b"[" * 200_000, "line 1: not JSON: nested too deeply"),
    ("a.jsonl", gzip.compress((GOOD + b"\n") * 1000, mtime=0)[:-20], "a.jsonl: the gzip file is .*cut short"),
    ("a.json", b"[" + GOOD, "a.json, row 2 .*: the file ends within the array"),
    ("a.jsonl", GOOD + b"\n" + b'{"a": "' + b"x" * 300_000, "line 2: .*longer than 100,000 bytes"),
    ("a.jsonl", b"Hi.\tSalut.\n", "line 1: not JSON: .*tuning reads JSON .*CSV or TSV with a header"),
    ("a.jsonl", GOOD.decode().encode("utf-16-le"), "looks like UTF-16 without a byte-order mark"),
    ("a.jsonl", b"<!DOCTYPE html><html>", "a.jsonl is a web page"),
    ("a.json", b'{"data": [], "tools": [1]}', 'line 1: beside "data" stands "tools"'),
    ("a.csv", b"question,answer\nq,a\nq\n", "a.csv, line 3: 1 cells, and the header has 2"),
    ("a.csv", b"question,question\nq,a\n", 'two columns are named "question"'),
    ("a.csv", b'question,answer\nq,"a\n', "a.csv, line 2: not CSV"),
    ("a.csv", "question,answer\né,a\n".encode("latin-1"), "a.csv, line 1 or later: the text is not UTF-8"),
    ("a.csv", b"question,answer,context\nq,a,c\n", 'a.csv, line 2: "context" holds content'),
])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes,
                                          said: str) -> None:
    monkeypatch.setattr(files, "MAX_ROW", 100_000 if b"xxx" in content else files.MAX_ROW)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(read_chats([tmp_path / name]))


def test_several_files_are_named_by_commas(tmp_path: Path) -> None:
    a, b, odd = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c,d:0.5.jsonl"
    for path in (a, b, odd):
        path.write_bytes(GOOD)
    (tmp_path / "link").symlink_to(a)
    assert chat_files(f"{a}, {b}") == [a, b]
    assert chat_files(str(odd)) == [odd], "a file that has the whole name is one file"
    for spec, said in {
        f"{a}:0.7,{b}:0.3": "tuning has no blend weights", f"{a},{a}": "names .*a.jsonl twice",
        f"{a},{tmp_path}/link": "names .*link twice .as .*a.jsonl too", f"{a},{tmp_path}/none": "none is not a file",
        str(tmp_path): "is a folder; name its files", " , ": "names no file",
    }.items():
        with pytest.raises(UserError, match=f"--valid-data .*{said}"):
            chat_files(spec, "--valid-data")
    (tmp_path / "corpus.idx").write_bytes(b"")
    (tmp_path / "corpus.bin").write_bytes(b"")
    for name in ("corpus", "corpus.bin", "corpus.idx"):
        with pytest.raises(UserError, match=f"{name} is a corpus of token ids; tuning reads files of chat rows"):
            chat_files(str(tmp_path / name))


@real_data
@pytest.mark.parametrize(("name", "rows", "answers", "empty"), [("gsm8k_train.jsonl", 7473, 7473, 0),
                                                                ("sharegpt_zh_1K.jsonl", 1000, 4372, 0)])
def test_real_files_are_read_whole(name: str, rows: int, answers: int, empty: int) -> None:
    assert DATA is not None
    chats = list(read_chats([DATA / "sft" / name]))
    said = [message.role == "assistant" for chat in chats for message in chat.messages]
    assert (len(chats), sum(said), sum(chat.empty_answers for chat in chats)) == (rows, answers, empty)


@real_data
@pytest.mark.parametrize(("name", "said"), [
    ("glaive_toolcall_en_demo.json", r'row 1 \(line 2\): "tools" holds content.*keys: conversations, tools'),
    ("alpaca_seed_tasks.jsonl", "line 1: no known kind of row.*instances"),
    ("cmrc2018_trial.json", r"row 1 \(line 1\): no known kind of row.*context_text, qas"),
    ("dev_sft_zh.csv", "line 2: no known kind of row.*plain text is for engine.pretrain.*keys: text"),
    ("tatoeba_en_zh.txt", "line 1: not JSON.*CSV or TSV with a header"),
])
def test_real_files_of_other_kinds_are_refused_by_name(name: str, said: str) -> None:
    assert DATA is not None
    with pytest.raises(UserError, match=rf"{name}, {said}"):
        list(read_chats([DATA / "sft" / name]))
