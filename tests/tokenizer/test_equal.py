"""A vocabulary without a tokenizer.json gets one that is proven equal, or the difference is found and said."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.equal import make_tokenizer_json
from engine.tokenizer.scripts import many_scripts
from engine.tokenizer.sp_json import sentencepiece_json
from engine.tokenizer.train_json import exact_scores

sys.path.insert(0, str(Path(__file__).parent))
import texts

pytest.importorskip("tokenizers")
DOCUMENTS = texts.corpus(100)
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# What the names of bytes are spelled with: they are entries of the library's lattice, and must not be the only way.
SPELLED = {"model_type": "unigram", "required_chars": "<>x0123456789ABCDEF|_imstarend/"}
EQUAL: dict[str, dict[str, Any]] = {
    "bpe": IDENTITY,
    "bpe without a space before": {**IDENTITY, "add_dummy_prefix": False},
    "bpe without bytes": {**IDENTITY, "byte_fallback": False},
    "bpe that folds spaces": {"normalization_rule_name": "identity"},
    "bpe with symbols": {**IDENTITY, "add_dummy_prefix": False,
                         "user_defined_symbols": ["<sep>", "\u2581\u2581", "\n\n", "的"]},
    "bpe with ChatML as symbols": {**IDENTITY, "user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "unigram": {**IDENTITY, **SPELLED},
    "unigram without bytes": {**IDENTITY, **SPELLED, "byte_fallback": False, "vocab_size": 180},
    "unigram with ChatML": {**SPELLED, "control_symbols": ["<|im_start|>", "<|im_end|>"],
                            "normalization_rule_name": "identity"},
}  # fmt: skip
NORMALISER = r'normaliser "nmt_nfkc" changes text .*\([0-9]+ texts\)$'
TIES = r"equally good, .*in float32 \([0-9]+ texts\)"
SYMBOLS = r"user-defined pieces are looked for .*\([0-9]+ texts?\)"
OTHER: dict[str, tuple[dict[str, Any], str, str]] = {
    "a space behind words": ({"treat_whitespace_as_suffix": True}, "it puts spaces behind words", ""),
    "characters": ({"model_type": "char", "vocab_size": 340}, "neither BPE nor unigram", ""),
    # tokenizers applies a character map to what it takes for one letter, and loses what follows in it.
    "a character map": ({"normalization_rule_name": "nmt_nfkc"}, "", NORMALISER),
    # Most of what the map changes is unknown to such a vocabulary; letters with a mark that joins them are not.
    "a character map, hidden by unknown pieces": ({"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": False},
                                                  "", '^its normaliser "nmt_nfkc_cf"'),
    # Sums in float32 and in float64 come out in another order where two splits are equally good.
    "unigram with scores as trained": ({**IDENTITY, **SPELLED, "byte_fallback": False, "vocab_size": 180}, "",
                                       f"^of splits that are {TIES}$"),
    "unigram that cannot spell the name of a byte": ({**IDENTITY, "model_type": "unigram"}, "",
                                                     "^a text spells the name of a byte or control piece"),
    # A text that is nothing but a symbol: the library normalises it as it does the symbol, without a space before it.
    "symbols behind a space": ({**IDENTITY, "user_defined_symbols": ["<sep>", "\n\n"]}, "", f"^{SYMBOLS}$"),
    "unigram with a character map": ({**SPELLED, "normalization_rule_name": "nmt_nfkc"}, "",
                                     '^its normaliser "nmt_nfkc"'),
    "unigram with symbols": ({**IDENTITY, **SPELLED, "user_defined_symbols": ["<sep>", "\n\n"]}, "",
                             f"{TIES}.*; {SYMBOLS}$"),
}  # fmt: skip


def trained(folder: Path, **changes: Any) -> Tokenizer:
    proto = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "num_threads": 1, "minloglevel": 2,
                "hard_vocab_limit": False, **changes}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS), model_writer=proto, **settings)
    (folder / "t.model").write_bytes(proto.getvalue())
    return load_tokenizer(str(folder / "t.model"))


def rounded(folder: Path) -> Tokenizer:
    """The model there with scores that float32 adds exactly, as vocabularies that are trained here have them."""
    (folder / "t.model").write_bytes(exact_scores((folder / "t.model").read_bytes()))
    return load_tokenizer(str(folder / "t.model"))


@pytest.mark.parametrize("name", EQUAL)
def test_a_sentencepiece_model_gets_an_equal_tokenizer_json(name: str, tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, **EQUAL[name])
    tokenizer = rounded(tmp_path) if "unigram" in name else tokenizer
    raw, found = make_tokenizer_json(tokenizer)
    assert found.equal and found.texts > 2000, found.example
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_bytes(raw)
    fast = load_tokenizer(str(tmp_path / "out"))
    for text in [*texts.CASES, *DOCUMENTS[:10]]:  # texts that the proof has not seen
        assert fast.encode(text) == tokenizer.encode(text), text
    for piece in ("<unk>", "<s>", "</s>", "<|im_end|>"):
        assert fast.token_id(piece) == tokenizer.token_id(piece)
    special = {token["content"] for token in json.loads(raw)["added_tokens"] if token["special"]}
    assert {"<s>", "</s>"} <= special and ("<|im_end|>" in special) == (tokenizer.token_id("<|im_end|>") is not None)


@pytest.mark.parametrize("name", OTHER)
def test_what_a_tokenizer_json_cannot_say_is_found(name: str, tmp_path: Path) -> None:
    changes, reason, why = OTHER[name]
    tokenizer = trained(tmp_path, **changes)
    if reason:
        with pytest.raises(UserError, match=reason):
            make_tokenizer_json(tokenizer)
        return
    _, found = make_tokenizer_json(tokenizer)
    assert not found.equal and 0 < found.differing < 100 and ": ids [" in found.example
    assert re.search(why, found.reasons), found.reasons


def test_added_tokens_keep_their_ids_or_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, **EQUAL["unigram"])
    rounded(tmp_path)
    (tmp_path / "t.model").rename(tmp_path / "tokenizer.model")
    size = load_tokenizer(str(tmp_path)).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<|im_start|>": size + 1}))
    raw, found = make_tokenizer_json(load_tokenizer(str(tmp_path)))
    assert found.equal and {t["content"]: t["id"] for t in json.loads(raw)["added_tokens"]}["<|im_start|>"] == size + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1}))
    with pytest.raises(UserError, match=f"leave out ids between {size} and {size + 1}"):
        make_tokenizer_json(load_tokenizer(str(tmp_path)))


def pair(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(DOCUMENTS, trainer)
    made.model.save(str(folder))


def ranks(folder: Path, name: str = "own") -> None:
    """The same pieces as a rank file."""
    pair(folder)
    pieces = load_tokenizer(str(folder)).samples()
    known = dict.fromkeys([bytes([byte]) for byte in range(256)] + [p.encode() for p in pieces if len(p.encode()) > 1])
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    lines = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(known))
    (folder / f"{name}.tiktoken").write_bytes(b"".join(lines))


def old_names(folder: Path) -> None:
    pair(folder)
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")


def qwen(folder: Path) -> None:
    pair(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')


FILES: dict[str, Callable[[Path], None]] = {"vocab.json": pair, "encoder.json": old_names, "qwen": qwen, "ranks": ranks}


@pytest.mark.parametrize("name", FILES)
def test_byte_level_files_get_an_equal_tokenizer_json(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    raw, found = make_tokenizer_json(tokenizer)
    assert found.equal and found.texts > 2000, found.example
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_bytes(raw)
    fast = load_tokenizer(str(tmp_path / "out"))
    for text in [*texts.CASES, *DOCUMENTS[:10]]:
        assert fast.encode(text) == tokenizer.encode(text), text
    assert fast.token_id("<|endoftext|>") == tokenizer.token_id("<|endoftext|>")


def test_one_score_that_is_not_the_models_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(tmp_path, **IDENTITY)

    def damaged(proto: bytes, added: Any = None) -> dict[str, Any]:
        content = sentencepiece_json(proto, added)
        content["model"]["merges"] = content["model"]["merges"][:-20]
        return content

    monkeypatch.setattr("engine.tokenizer.sp.sentencepiece_json", damaged)
    _, found = make_tokenizer_json(tokenizer)
    assert not found.equal and found.example


def test_the_texts_are_the_same_ones_every_time_and_of_many_scripts() -> None:
    found = many_scripts(["the", "数"])
    assert found == many_scripts(["the", "数"]) and len(found) > 2000
    letters = {character for text in found for character in text}
    assert all(any(first <= ord(one) <= last for one in letters) for first, last in
               [(0x61, 0x7A), (0x3B1, 0x3C9), (0x430, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x939),
                (0xE01, 0xE30), (0x3041, 0x3096), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F)])  # fmt: skip
