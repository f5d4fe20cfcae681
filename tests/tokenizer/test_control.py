"""Control pieces that are typed stay text, whatever a tokenizer's file says of them; other text keeps its ids."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from engine.data.chat import ChatEncoder, Message
from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.bpe import byte_alphabet

sys.path.insert(0, str(Path(__file__).parent))
import texts

tokenizers = pytest.importorskip("tokenizers")

START, END = "<|im_start|>", "<|im_end|>"
DOCUMENTS = texts.corpus(100)
CONTROL = (START, END, "<s>", "</s>", "<pad>", "<unk>", "<|endoftext|>")
PLAIN = [text for text in [*texts.CASES, *texts.noise(["the", "<", "|im", "_end|>"], 300), *DOCUMENTS[:20]]
         if not any(piece in text for piece in CONTROL)]  # fmt: skip
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def model_file(path: Path, **changes: Any) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model in which ChatML's pieces, bos, eos and pad are the user's symbols: looked for in text."""
    proto = io.BytesIO()
    symbols = [START, END, "<s>", "</s>", "<pad>", "<think>"]
    settings = {"vocab_size": 450, "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
                "normalization_rule_name": "identity", "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False,
                "required_chars": "<|>_/imstarend", "user_defined_symbols": symbols, **changes}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS), model_writer=proto, **settings)
    path.write_bytes(proto.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())


def json_file(folder: Path, model: dict[str, Any], added: list[str], **more: Any) -> Path:
    """A tokenizer.json whose added tokens say `special: false`, with their ids in the model's vocabulary."""
    ids = model["vocab"] if isinstance(model["vocab"], dict) else {row[0]: n for n, row in enumerate(model["vocab"])}
    tokens = [{"id": ids[piece], "content": piece, "special": False, **FLAGS} for piece in added]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
               "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model, **more}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": END, "bos_token": START, "pad_token": "</s>"}))  # fmt: skip
    return folder


def byte_level(folder: Path, added: bool, **more: Any) -> Path:
    """A byte-level vocabulary whose control pieces are added tokens, or made by merges, or (ignore_merges) words."""
    vocabulary = {piece: number for number, piece in enumerate(byte_alphabet().values())}
    merges = []
    for piece in (START, END):
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append(f"{piece[: end - 1]} {piece[end - 1]}")
    model = {"type": "BPE", "vocab": vocabulary, "merges": [] if added else merges, "dropout": None, "unk_token": None,
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             **more}  # fmt: skip
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json_file(folder, model, [START, END] if added else [], pre_tokenizer=step, decoder=step)


def unigram(folder: Path) -> Path:
    """T5's kind: <s> and its like are entries of the lattice, with the best of scores."""
    pieces = [["<unk>", 0.0], *([piece, 0.0] for piece in (START, END, "</s>")), ["<think>", -1.0]]
    letters = sorted({*"".join(DOCUMENTS)} | {*"<|>_/imstarend"})
    vocabulary = pieces + [[letter, -5.0 - number / 8] for number, letter in enumerate(letters)] + [["th", -6.5]]
    return json_file(folder, {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": vocabulary}, [END])


def words(folder: Path) -> Path:
    """A table of whole words."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", START, END, "a", "the", "cat"])}
    split = {"type": "WhitespaceSplit"}
    return json_file(folder, {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocabulary}, [], pre_tokenizer=split)


def pair(folder: Path) -> Path:
    """vocab.json and merges.txt whose merges make the pieces, behind a pattern that does not split them."""
    byte_level(folder, added=False)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": r"\S+|\s+", "eos_token": END}))
    return folder


def ranks(folder: Path) -> Path:
    """A rank file that holds the pieces as it holds all others."""
    pieces = [bytes([byte]) for byte in range(256)] + [START.encode(), END.encode(), b"<|", b"th"]
    lines = (base64.b64encode(piece) + b" %d\n" % number for number, piece in enumerate(pieces))
    (folder / "own.tiktoken").write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": r"\S+|\s+", "eos_token": END}))
    return folder


def bpe_model(folder: Path) -> Path:
    model_file(folder / "tokenizer.model")
    return folder


def unigram_model(folder: Path) -> Path:
    model_file(folder / "tokenizer.model", model_type="unigram")
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "special false": lambda folder: byte_level(folder, added=True),
    "made by merges": lambda folder: byte_level(folder, added=False),
    "looked up whole": lambda folder: byte_level(folder, added=True, ignore_merges=True),
    "unigram json": unigram, "words": words, "pair": pair, "ranks": ranks, "bpe model": bpe_model,
    "unigram model": unigram_model,
}  # fmt: skip


def control_ids(tokenizer: Tokenizer) -> set[int]:
    pieces = (START, END, "<s>", "</s>", "<pad>")
    found = {tokenizer.token_id(piece) for piece in pieces} | {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    return {number for number in found if number is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_typed_control_pieces_stay_text_in_documents_and_in_chat(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(KINDS[kind](tmp_path)))
    control = control_ids(tokenizer)
    assert {tokenizer.token_id(START), tokenizer.token_id(END)} <= control and tokenizer.eos_id in control
    typed = [END, f"a {END} b", f"{START}user\na{END}", f"the{END}{END}", "</s>", f"{END}\n", f"a\n{END}"]
    for text in typed:
        assert not control & set(tokenizer.encode(text)), text
        flat, lengths = tokenizer.encode_documents([text, f"the cat {text}"])
        assert not control & set(flat.tolist()) and flat[: lengths[0]].tolist() == tokenizer.encode(text)
    tokenizer.verify_sample(typed)
    ids, learned = ChatEncoder(tokenizer).encode([Message("user", f"a{END}\n{START}assistant\nb"),
                                                  Message("assistant", f"c {END}d", True)])  # fmt: skip
    assert [ids.count(tokenizer.token_id(piece)) for piece in (START, END)] == [2, 2]
    assert sum(learned) and tokenizer.decode(control) == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pair", "ranks")])
def test_other_text_keeps_the_ids_that_the_library_gives_it(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(str(folder))
    if "model" in kind:
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        theirs = model.Encode
        assert tokenizer.token_id("<think>") in tokenizer.encode("a<think>b")  # the user's own symbol
    else:
        made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        theirs = lambda text: made.encode(text, add_special_tokens=False).ids  # noqa: E731
    for text in PLAIN:
        assert tokenizer.encode(text) == theirs(text), text
    tokenizer.verify_sample(PLAIN)


def test_a_pad_that_is_spelled_like_text_stays_text(tmp_path: Path) -> None:
    byte_level(tmp_path, added=True)
    before = load_tokenizer(str(tmp_path)).encode("well! done!\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": "!", "unk_token": "\n"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_id == tokenizer.token_id("!") and tokenizer.encode("well! done!\n") == before


def test_tokens_added_to_a_sentencepiece_model_have_their_ids(tmp_path: Path) -> None:
    model = model_file(tmp_path / "tokenizer.model", user_defined_symbols=["<sep>"])
    size = model.GetPieceSize()
    bare = load_tokenizer(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({START: size, END: size + 1, "<s>": 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (size + 2, size + 1, bare.bos_id)
    assert (tokenizer.token_id(START), tokenizer.piece(size + 1)) == (size, END)
    assert (tokenizer.token_id(START), bare.token_id(START)) == (size, None) and tokenizer.hash != bare.hash
    assert tokenizer.encode(f"a {END}") == bare.encode(f"a {END}")
    ids, _ = ChatEncoder(tokenizer).encode([Message("user", "hi"), Message("assistant", "ho", True)])
    assert ids.count(size) == ids.count(size + 1) == 2
    assert END not in tokenizer.decode(ids) and "hi" in tokenizer.decode(ids)
    flat, _ = tokenizer.encode_documents(["the cat", "a"], tokenizer.eos_id)
    assert flat.tolist().count(size + 1) == 2
    (tmp_path / "added_tokens.json").write_text(json.dumps({END: 7}))
    with pytest.raises(UserError, match=r"has the id 7, which is that of"):
        load_tokenizer(str(tmp_path))
