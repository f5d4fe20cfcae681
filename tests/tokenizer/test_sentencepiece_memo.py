"""The memo encoder of sentencepiece models gives sentencepiece's ids, or says that it is not used."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.indexed import token_dtype as dtype_on_disk
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer, segments
from engine.tokenizer.base import token_dtype
from engine.tokenizer.cut import CutEncoder
from engine.tokenizer.safe_pairs import SafePairs, joined_in

sys.path.insert(0, str(Path(__file__).parent))
import texts

DOCUMENTS = texts.corpus()
BASE: dict[str, Any] = {
    "vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "character_coverage": 0.98, "num_threads": 1, "minloglevel": 2,
}  # fmt: skip
CUT = {
    "as ours": {"allow_whitespace_only_pieces": True, "split_digits": True},
    "pieces over spaces": {"split_by_whitespace": False},
    "pieces over scripts": {"split_by_unicode_script": False, "split_by_number": False, "max_sentencepiece_length": 32},
    "no dummy prefix": {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
    "nfkc, spaces removed": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "nfkc_cf, no prefix": {"normalization_rule_name": "nmt_nfkc_cf", "add_dummy_prefix": False},
    "identity, spaces removed": {"remove_extra_whitespaces": True},
    "user symbols": {"user_defined_symbols": ["<sep>", "\u2581\u2581", "ab", "\n\n", "数学", "\u2581the"]},
}
REFERENCE = {
    "unigram": ({"model_type": "unigram", "vocab_size": 400}, "unigram scores are not additive"),
    "no byte fallback": ({"byte_fallback": False, "vocab_size": 400}, "joins neighbouring <unk>"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "spaces belong to the word before"),
    "symbol with a space": ({"user_defined_symbols": ["a b"]}, "user-defined symbol holds a space"),
    "characters": ({"model_type": "char", "vocab_size": 350}, "the model is not BPE"),
}


def trained(folder: Path, **changes: Any) -> Tokenizer:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=proto, **{**BASE, **changes}
    )
    (folder / "t.model").write_bytes(proto.getvalue())
    return load_tokenizer(str(folder / "t.model"))


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.files["tokenizer.model"]))
    return [model.IdToPiece(number).replace("\u2581", " ") for number in range(model.GetPieceSize())]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("ours"), **CUT["as ours"])


@pytest.mark.parametrize("name", CUT)
def test_the_memo_gives_the_ids_of_sentencepiece(name: str, tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, **CUT[name])
    assert tokenizer.describe().startswith("memo encoder (exact)")
    pieces = pieces_of(tokenizer)
    for _ in "cold", "warm":
        tokenizer.verify_sample([*texts.CASES, *texts.noise(pieces), *DOCUMENTS])


@pytest.mark.parametrize("name", REFERENCE)
def test_where_a_cut_could_change_ids_sentencepiece_encodes_and_that_is_said(name: str, tmp_path: Path) -> None:
    changes, reason = REFERENCE[name]
    tokenizer = trained(tmp_path, **changes)
    assert tokenizer.describe().startswith("sentencepiece itself: ") and reason in tokenizer.describe()
    tokenizer.verify_sample([*texts.CASES, *DOCUMENTS[:20]])


def test_without_byte_fallback_a_cut_would_change_ids(tmp_path: Path) -> None:
    """Two unknown characters are one <unk>; cut apart, two. This is why such models are left alone."""
    tokenizer = trained(tmp_path, byte_fallback=False, vocab_size=400)
    assert tokenizer.encode("\u4dff\u4dfe")[-1:] == tokenizer.encode("\u4dff")[-1:]
    assert len(tokenizer.encode("\u4dff\u4dfe")) == len(tokenizer.encode("\u4dff"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_string_of_pieces_and_characters_gives_the_same_ids(ours: Tokenizer, data: st.DataObject) -> None:
    parts = st.sampled_from(pieces_of(ours)) | st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\u2581")
    text = "".join(data.draw(st.lists(parts, max_size=30)))
    ours.verify_sample([text, text.replace(" ", "  ")])


@pytest.mark.parametrize("name", ["c4", "wikitext with <unk>", "one long text", "shakespeare", "Chinese articles",
                                  "poems", "Chinese chat", "chat with <s>", "indented"])  # fmt: skip
def test_llama_on_real_text(shared_data: Path, name: str, llama: Tokenizer) -> None:
    llama.verify_sample(texts.real_texts(shared_data)[name])


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Tokenizer:
    found = load_tokenizer(str(shared_data / "tokenizer" / "llama2.model"))
    found.verify_sample([*texts.CASES, *texts.noise([])])
    return found


def test_documents_come_flat_with_their_lengths_and_end_tokens(ours: Tokenizer) -> None:
    documents = ["a b", "", "数学", " "]
    tokens, lengths = ours.encode_documents(documents, eod=ours.eos_id)
    expected = [ours.encode(text) + [ours.eos_id] * bool(text) for text in documents]  # the empty one stays empty
    assert tokens.tolist() == [number for one in expected for number in one]
    assert lengths.tolist() == [len(one) for one in expected] and lengths.dtype == np.int64
    assert tokens.dtype == np.uint16
    assert [len(array) for array in ours.encode_documents([])] == [0, 0]


@pytest.mark.parametrize("size", [1, 65499, 65500, 10**6])
def test_ids_have_the_dtype_they_are_stored_in(size: int) -> None:
    assert token_dtype(size) == dtype_on_disk(size)


def test_control_pieces_are_never_made_from_text(ours: Tokenizer) -> None:
    tokens, _ = ours.encode_documents(["<s></s><unk> </s> <s> <pad>", "x </s>"])
    assert not {0, 1, 2} & set(tokens.tolist())


def test_a_lone_surrogate_is_named_and_leaves_no_trace(ours: Tokenizer) -> None:
    for text in ("a \ud800 b c", "\udfff", "数学\ud812"):
        with pytest.raises(UserError, match="lone surrogate U"):
            ours.encode_documents(["fine text", text, "more"])
        ours.verify_sample(["fine text", "more", "a ? b c"])


def test_a_difference_from_the_reference_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(tmp_path)
    tokenizer.verify_sample(["the cat", "the mat"])
    monkeypatch.setattr(CutEncoder, "encode", lambda self, given: [b"\x05\x00" for _ in given])
    with pytest.raises(UserError, match=r"differ at token 0, after '': \[5\] and \["):
        tokenizer.verify_sample(["the cat", "the mat"])
    tokenizer.use_reference()
    tokenizer.verify_sample(["the cat", "the mat"])
    assert "as asked for" in tokenizer.describe()


def test_memory_of_a_memo_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LIMIT_BYTES", 2 << 20)
    tokenizer = trained(tmp_path)
    sizes = set()
    for part in range(40):
        tokenizer.verify_sample([f"w{part}{number} 数{number} x{part}-{number}" for number in range(500)])
        found = tokenizer._built()[0]
        assert isinstance(found, CutEncoder)
        sizes.add(found._words._memo.nbytes_next)
    assert len(sizes) > 1 and max(sizes) <= 2 << 20


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "the " * 100_000, "数学" * 150_000, "\n" * 100_000,
                                  "a b" * 200_000, "数学 " * 150_000])  # fmt: skip
def test_long_texts_are_cut_into_windows_without_a_trace(ours: Tokenizer, text: str) -> None:
    ours.verify_sample([text, f"x{text}", text + "y"])


def test_safe_pairs_are_those_no_piece_holds() -> None:
    pieces = ["ab", "bcd", "\u2581the", "数学家", "\u2581\u2581", "🙂a"]
    joined = joined_in(pieces)
    characters = sorted({one for piece in pieces for one in piece} | set("xyz\0\U0010ffff"))
    text = "".join(one + two for one in characters for two in characters)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    expected = [not any(text[at : at + 2] in piece for piece in pieces) for at in range(len(text) - 1)]
    assert SafePairs(joined).safe(codes).tolist() == expected


def test_windows_of_a_text_without_any_cut_are_the_text() -> None:
    pairs = SafePairs({("a", "a")})
    assert list(pairs.windows("a" * 600_000)) == ["a" * 600_000]
    text = "a" * 300_000 + "b" + "a" * 300_000
    assert list(pairs.windows(text)) == ["a" * 300_000, "b" + "a" * 300_000]
