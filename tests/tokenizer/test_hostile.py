"""Tokenizer files that are damaged or mean harm: one clear line, or the right ids."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.tokenizer import load_tokenizer
from engine.tokenizer.bpe import byte_alphabet

ALPHABET = byte_alphabet()
VOCABULARY: dict[str, Any] = {piece: number for number, piece in enumerate(ALPHABET.values())}
VOCABULARY |= {"ab": 256, "abc": 257, "bc": 258, "<|endoftext|>": 259}
MERGES = ["a b", "ab c", "b c"]


def write_pair(folder: Path, vocabulary: Any = None, merges: list[str] | None = None) -> str:
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY if vocabulary is None else vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(MERGES if merges is None else merges)]) + "\n")
    return str(folder)


def write_json(folder: Path, vocabulary: Any = None, merges: Any = None, added: Any = ()) -> str:
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": VOCABULARY if vocabulary is None else vocabulary, "merges": MERGES if merges is None else merges,
    }  # fmt: skip
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added), "normalizer": None,
               "pre_tokenizer": step, "post_processor": None, "decoder": step, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


BAD: dict[str, tuple[Any, Any, str]] = {
    "id twice": (VOCABULARY | {"ab": 5}, None, "'ab' have the same id, 5"),
    "negative id": (VOCABULARY | {"ab": -1}, None, "the id of 'ab' is -1"),
    "id is text": (VOCABULARY | {"ab": "256"}, None, "the id of 'ab' is '256'"),
    "id is true": (VOCABULARY | {"ab": True}, None, "the id of 'ab' is True"),
    "id is a fraction": (VOCABULARY | {"ab": 256.0}, None, "the id of 'ab' is 256.0"),
    "id far out": (VOCABULARY | {"ab": 10**12}, None, "1,000,000,000,000, out of range for 260 entries"),
    "id too far out for a model": (VOCABULARY | {"ab": 4_294_967_295}, None, "out of range for 260 entries"),
    "no vocabulary": ({}, [], "holds no vocabulary"),
    "merge of nothing known": (None, [*MERGES, "x yz"], "'yz'"),
    "merge makes nothing known": (None, [*MERGES, "x y"], "'xy'"),
    "merge of three": (None, [*MERGES, "a b c"], "a merge is two pieces"),
}


@pytest.mark.parametrize("write", [write_pair, write_json])
@pytest.mark.parametrize("name", BAD)
def test_what_contradicts_itself_is_named_in_one_line(write: Callable[..., str], name: str, tmp_path: Path) -> None:
    vocabulary, merges, message = BAD[name]
    folder = write(tmp_path, vocabulary, merges)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("write", [write_pair, write_json])
def test_merges_that_go_in_circles_end(write: Callable[..., str], tmp_path: Path) -> None:
    """Listed before what they are made of, and two ways to the same piece: the queue still runs dry."""
    ours = load_tokenizer(write(tmp_path, None, ["ab c", "a bc", "b c", "a b"]))
    assert ours.encode("abc abab") == [257, VOCABULARY["Ġ"], 256, 256]
    ours.verify_sample(["abc abab bc cab", "abc" * 2000, "a" * 50_000])


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path)
    text = (tmp_path / "vocab.json").read_text()
    (tmp_path / "vocab.json").write_text(text.replace('"ab": 256', '"ab": 256, "ab": 260'))
    with pytest.raises(UserError, match=r"vocab.json is not JSON that can be read: the key 'ab' is there twice"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("merges, message", [
    (["a b", "ab c", "a b"], r"merges.txt:4: this merge was listed before, as merge 1"),
    (["a b", "a  b"], r"merges.txt:3: a merge is two pieces"),
    (["a b", "é è"], r"merges.txt:3: 'éè' is not in vocab.json"),
])  # fmt: skip
def test_bad_merges_are_named_with_their_line(tmp_path: Path, merges: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(write_pair(tmp_path, None, merges))


def test_files_that_are_no_byte_level_vocabulary_are_said(tmp_path: Path) -> None:
    write_pair(tmp_path, {"a": 0, "b": 1, "ab": 2}, ["a b"])
    with pytest.raises(UserError, match=r"lacks 241 of the 243 bytes that text is made of, first 0x00"):
        load_tokenizer(str(tmp_path))
    write_pair(tmp_path, VOCABULARY | {"数": 260, "数a": 261}, ["数 a"])
    with pytest.raises(UserError, match="'数' is not written in GPT-2's alphabet of bytes"):
        load_tokenizer(str(tmp_path))
    write_pair(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"a b\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"merges.txt is not UTF-8 at byte 4"):
        load_tokenizer(str(tmp_path))
    for content in (b"", b"[1, 2]", b"{" * 100_000, b'{"a": 1', b"\x80\x04pickle"):
        (tmp_path / "vocab.json").write_bytes(content)
        with pytest.raises(UserError, match="vocab.json") as caught:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_folder_of_another_kind_of_vocabulary_is_not_guessed_at(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UserError, match=r"how CLIPTokenizer splits text is not known here; use .* tokenizer.json"):
        load_tokenizer(str(tmp_path))
    for config, message in [
        ('{"pat_str": 5}', '"pat_str" is a int, not text'), ('{"pat_str": "("}', r"cannot be read: missing \)"),
        ('{"pat_str": "(a)|."}', "has groups that capture"), ("[]", "holds a JSON list, not an object"),
        ('{"added_tokens_decoder": {"3": {"content": "<x>"}}}', "'<x>' has the id 3, which is that of b"),
        ('{"added_tokens_decoder": {"x": {"content": "<x>"}}}', "the id of '<x>' is 'x'"),
        ('{"added_tokens_decoder": {"300": {"content": "<x>"}, "0300": {"content": "<y>"}}}', "have the same id, 300"),
    ]:  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"pat_str": "[a-z]+"}')
    with pytest.raises(UserError, match="pattern leaves out a part of the text"):
        load_tokenizer(str(tmp_path)).encode("ab 1")


def rank_lines(changes: dict[int, bytes] | None = None) -> bytes:
    pieces = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc"]
    lines = {rank: base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces)}
    return b"\n".join((lines | (changes or {})).values()) + b"\n"


@pytest.mark.parametrize("content, message", [
    (rank_lines({256: b"YWI= 255"}), r"257: the rank 255 was there before"),
    (rank_lines({256: b"YQ== 256"}), r"257: the piece b'a' was there before"),
    (rank_lines({256: b"YWI= -4"}), r"257: the rank is -4"),
    (rank_lines({256: b"YWI= 99999999"}), r"the id of b'ab' is 99,999,999, out of range for 258 entries"),
    (rank_lines({256: b"YWI="}), r"257: not a piece in base64 and its rank"),
    (rank_lines({256: b"YW* 256"}), r"257: not a piece in base64 and its rank"),
    (rank_lines({256: b"YWI= x"}), r"257: not a piece in base64 and its rank"),
    (rank_lines({97: b""}), r"lacks 1 of the 243 bytes that text is made of, first 0x61"),
    (b"", "is empty"), (b"\n\n", "is empty"), (b"\x80\x04pickle", "1: not a piece in base64"),
])  # fmt: skip
def test_bad_rank_files_are_named_with_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "own.tiktoken").write_bytes(content)
    for path in (tmp_path, tmp_path / "own.tiktoken"):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value) and "own.tiktoken" in str(caught.value)


@pytest.mark.parametrize("change", [lambda raw: raw.replace(b"\n", b"\r\n"), lambda raw: b"\xef\xbb\xbf" + raw,
                                    lambda raw: raw.replace(b"\n", b"\n\n"), lambda raw: raw.rstrip()])  # fmt: skip
def test_rank_files_as_editors_leave_them_are_read(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    (tmp_path / "own.tiktoken").write_bytes(change(rank_lines()))
    assert load_tokenizer(str(tmp_path)).encode("abc é") == [257, 32, 0xC3, 0xA9]


def test_a_rank_file_may_be_named_tokenizer_model(tmp_path: Path) -> None:
    """As Llama 3's is."""
    (tmp_path / "tokenizer.model").write_bytes(rank_lines())
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(str(path)).encode("abc") == [257]


def test_two_rank_files_in_a_folder_are_a_question(tmp_path: Path) -> None:
    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / name).write_bytes(rank_lines())
    with pytest.raises(UserError, match="holds 2 rank files"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path / "b.tiktoken")).vocab_size == 258


@pytest.mark.parametrize("ids", [[10**9], [-1], [259, 260]])
def test_decoding_an_id_outside_of_the_vocabulary_is_an_error(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="is not in the vocabulary of 260"):
        load_tokenizer(write_pair(tmp_path)).decode(ids)


@pytest.mark.parametrize("added, message", [
    ([{"content": [], "id": 0}], "the content of an added token is"), (5, "the added tokens are no list"),
])  # fmt: skip
def test_added_tokens_that_are_none_are_one_line(tmp_path: Path, added: Any, message: str) -> None:
    write_json(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": added}))
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))
    content["model"]["continuing_subword_prefix"] = 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the prefix of continuing subwords is 5, not text"):
        load_tokenizer(str(tmp_path))


def test_an_added_id_far_out_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 10**12}))
    with pytest.raises(UserError, match=r"the id of '<\|end\|>' is 1,000,000,000,000, out of range for 261 entries"):
        load_tokenizer(str(tmp_path))


def test_merges_that_spell_a_byte_piece_are_left_to_the_library(tmp_path: Path) -> None:
    """Text that reads <0x1F> would become the id that stands for the byte."""
    bytes_ = {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    pieces = ["\u2581", *"ab<0x1F>", "0x", "1F", "0x1F", "0x1F>"]
    vocabulary = {"<unk>": 0} | bytes_ | {piece: 257 + number for number, piece in enumerate(dict.fromkeys(pieces))}
    write_json(tmp_path, vocabulary, ["0 x", "1 F", "0x 1F", "0x1F >", "< 0x1F>"])
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, replace]
    content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None, "decoder": None}
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert "its merges join fallback bytes" in tokenizer.describe()
    tokenizer.verify_sample(["a <0x1F> b", "a\x1fb", "<0x1F>"])


def test_paths_too_long_for_a_name_are_one_line() -> None:
    with pytest.raises(UserError, match="is neither a .model"):
        load_tokenizer("x" * 5000)
