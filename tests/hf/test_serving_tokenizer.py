"""An export's tokenizer gives the ids that the model was trained with, by transformers itself; no file is lost."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from engine.checkpoint import Entry, Resolved, alone, resolve, save_checkpoint
from engine.config import ModelConfig, RunConfig, to_dict
from engine.data.chat import ChatEncoder, Message
from engine.errors import UserError
from engine.hf import assets_for
from engine.hf.convert import convert
from engine.hf.verify import verify
from engine.model import Decoder, Parts
from engine.parallel.init import initialize
from engine.parallel.sharding import pieces, shard_of
from engine.tokenizer import Tokenizer, is_tokenizer, load_tokenizer, tokenizer_files
from engine.train.job import _tokenizer as run_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizer"))
import texts
from test_equal import old_names, ranks

pytest.importorskip("transformers")
SYMBOLS = ["<|im_start|>", "<|im_end|>"]
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def bare_model(folder: Path, **changes: Any) -> Path:
    proto = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "num_threads": 1, "minloglevel": 2,
                "hard_vocab_limit": False, **IDENTITY, **changes}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts.corpus(100)), model_writer=proto, **settings)
    (folder / "t.model").write_bytes(proto.getvalue())
    return folder / "t.model"


def made_run(folder: Path, tokenizer: Tokenizer, *, kept: bool = True) -> Path:
    """A run with one checkpoint of a small model, saved with a tokenizer as training saves it; not kept: with its hash
    alone, as checkpoints once were."""
    config = ModelConfig(layers=1, hidden=16, ffn_hidden=16, heads=2, kv_heads=2, head_dim=8,
                         vocab_size=tokenizer.vocab_size)
    entries = []
    for parameter in Decoder(Parts(config), range(1)).parameters():
        initialize(parameter, 3)
        entries += [Entry("model", p, parameter.detach()[p.rows[0] : p.rows[1]])
                    for p in pieces(shard_of(parameter), 0, parameter.shape[0])]
    meta = {"samples": 0, "config": to_dict(RunConfig(model=config)), "world": {"pp": 1, "dp": 1, "cp": 1, "tp": 1},
            "tokenizer": tokenizer.hash}
    save_checkpoint(folder / "checkpoints", 1, entries, rank=0, world=1, agree=alone, meta=meta,
                    assets=assets_for(config, tokenizer if kept else None))
    return folder


def export(run: Path, save: Path, *, force: bool = False) -> list[str]:
    """Exports and verifies; what both said."""
    lines: list[str] = []
    convert(run, save, to="hf", dtype=None, shard_bytes=10**9, say=lines.append, force=force)
    lines.append(f"verified: {verify(run, save, None, lines.append)}")
    return lines


def make(kind: str, folder: Path) -> Tokenizer:
    folder.mkdir()
    if kind == "bpe":
        return load_tokenizer(str(bare_model(folder, user_defined_symbols=SYMBOLS, pad_id=3)))
    {"encoder.json": old_names, "ranks": ranks}[kind](folder)
    return load_tokenizer(str(folder / "own.tiktoken" if kind == "ranks" else folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "encoder.json", "ranks"])
def test_an_export_encodes_as_the_model_was_trained(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path / "t")
    run = made_run(tmp_path / "run", tokenizer)
    lines = export(run, tmp_path / "hf")
    assert lines[-1] == "verified: True" and "made from the tokenizer's files, the same ids on" in lines[0], lines
    assert "by transformers" in lines[-2] and lines[-2].startswith("ids: equal, 2,"), lines
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False and settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    if kind == "bpe":
        check_client(tmp_path / "hf", tokenizer)
    # What a checkpoint holds is what was given to it, and a resumed run loads it again.
    saved = load_tokenizer(str(resolve(run).folder / "hf"))
    assert saved.hash == tokenizer.hash and saved.encode("the cat 数学") == tokenizer.encode("the cat 数学")
    # And in again: the folder that transformers reads is also read by the engine.
    lines = []
    convert(tmp_path / "hf", tmp_path / "back", to="engine", dtype=None, shard_bytes=10**9, say=lines.append)
    assert set(tokenizer_files(tmp_path / "hf")) <= set(tokenizer_files(resolve(tmp_path / "back").folder / "hf"))
    assert verify(tmp_path / "hf", tmp_path / "back", None, lines.append), lines


def test_an_export_that_cannot_be_equal_is_refused_without_force(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(bare_model(tmp_path, normalization_rule_name="nmt_nfkc")))
    run = made_run(tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match=r"differs from them on \d+ of 2,\d+ texts: its normaliser \"nmt_nfkc\" .*; "
                       r"first .*--force exports it"):
        export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    lines = export(run, tmp_path / "hf", force=True)
    assert "NOT equal to what the model was trained with" in lines[0] and lines[-1] == "verified: False"
    assert lines[-2].startswith("ids: not equal, transformers"), lines


@pytest.mark.parametrize("changes", [{"user_defined_symbols": SYMBOLS, "pad_id": 3}, {
    "model_type": "unigram", "byte_fallback": False, "bos_id": -1}])
def test_a_model_that_no_tokenizer_json_expresses_is_exported_so_that_transformers_loads_it(
        tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(str(bare_model(tmp_path, treat_whitespace_as_suffix=True, **changes)))
    run, how = made_run(tmp_path / "run", tokenizer), {"to": "hf", "dtype": None, "shard_bytes": 10**9}
    with pytest.raises(UserError, match=r"it puts spaces behind words \(treat_whitespace_as_suffix\).*--force"):
        convert(run, tmp_path / "hf", say=print, **how)  # type: ignore[arg-type]
    lines: list[str] = []
    convert(run, tmp_path / "hf", say=lines.append, force=True, **how)  # type: ignore[arg-type]
    assert "none is written: a tokenizer.json cannot express" in lines[0] and "AutoTokenizer loads it" in lines[1]
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    from transformers import AutoTokenizer

    client = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert client.eos_token_id == tokenizer.eos_id and len(client) == tokenizer.vocab_size
    for text in texts.CASES:
        if not any(token in text for token in client.all_special_tokens):
            assert client.encode(text) == tokenizer.encode(text), text
    again = load_tokenizer(str(tmp_path / "hf"))
    assert again.hash == tokenizer.hash and again.encode("the cat") == tokenizer.encode("the cat")
    if client.chat_template is not None:
        rows = [{"role": "user", "content": "the cat"}]
        ids = client.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
        asked = ChatEncoder(tokenizer).encode([Message("user", "the cat"), Message("assistant", "a")])[0]
        assert ids == asked[: len(ids)]


def test_verify_finds_an_export_whose_tokenizer_is_another(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", load_tokenizer(str(bare_model(tmp_path))))
    export(run, tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"] = content["normalizer"]["normalizers"][1:]  # no space before a text
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content))
    lines: list[str] = []
    (tmp_path / "hf" / "tokenizer.model").rename(tmp_path / "aside")
    assert not verify(run, tmp_path / "hf", None, lines.append) and "ids: not equal, Triax differs on" in lines[-1]
    (tmp_path / "aside").rename(tmp_path / "hf" / "tokenizer.model")  # read by the engine alone
    assert not verify(run, tmp_path / "hf", None, lines.append) and "ids: not equal, transformers" in lines[-1]
    for path in tokenizer_files(tmp_path / "hf").values():
        path.unlink()
    assert not verify(run, tmp_path / "hf", None, lines.append) and "has no tokenizer and the other" in lines[-1]


@pytest.mark.slow
def test_a_folder_that_asks_for_bos_exports_a_tokenizer_that_puts_it_there(tmp_path: Path) -> None:
    bare_model(tmp_path).rename(tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = export(made_run(tmp_path / "run", load_tokenizer(str(tmp_path))), tmp_path / "hf")
    assert lines[-1] == "verified: True", lines
    from transformers import AutoTokenizer

    client = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert client("the cat")["input_ids"][0] == client.bos_token_id == 1 and "legacy" not in client.init_kwargs


def check_client(folder: Path, tokenizer: Tokenizer) -> None:
    """What a user of transformers does with the folder: a padded batch and back, and a conversation."""
    from transformers import AutoTokenizer

    client = AutoTokenizer.from_pretrained(folder)
    batch = client(["the cat", "a b c d e f g"], padding=True, return_tensors="pt")
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tokenizer.pad_id)
    assert client.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["the cat", "a b c d e f g"]
    ids = client.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.token_id("<|im_start|>")) == 2 and ids.count(tokenizer.token_id("<|im_end|>")) == 1


@pytest.mark.parametrize("names, holds", [
    (["tokenizer.model"], True), (["tokenizer.json"], True), (["vocab.json", "merges.txt"], True),
    (["encoder.json", "vocab.bpe"], True), (["own.tiktoken"], True), (["vocab.json", "vocab.bpe"], False),
    (["added_tokens.json", "tokenizer_config.json"], False),
])
def test_one_list_says_what_a_tokenizer_consists_of(names: list[str], holds: bool, tmp_path: Path) -> None:
    for name in [*names, "config.json", "model.safetensors"]:
        (tmp_path / name).touch()
    assert set(tokenizer_files(tmp_path)) == set(names) and is_tokenizer(tokenizer_files(tmp_path)) == holds


def test_a_run_knows_its_tokenizer_again_whatever_files_it_has(tmp_path: Path) -> None:
    """--load takes the tokenizer of the folder, so the next checkpoint has it; --resume refuses another one."""
    folder, other = tmp_path / "t", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        old_names(place)
    merges = (other / "vocab.bpe").read_text().splitlines()
    (other / "vocab.bpe").write_text("\n".join(merges[:-5]))
    tokenizer = load_tokenizer(str(folder))
    step = resolve(made_run(tmp_path / "run", tokenizer)).folder
    for weights in (Resolved("run", step), Resolved("hf", folder)):
        found = run_tokenizer({}, weights, None, [])
        assert found is not None and found.hash == tokenizer.hash
        assert {"encoder.json", "vocab.bpe"} <= set(found.files)
    assert run_tokenizer({"tokenizer": str(folder)}, None, step, []) is not None
    with pytest.raises(UserError, match="is not the one that"):
        run_tokenizer({"tokenizer": str(other)}, None, step, [])
    step = resolve(made_run(tmp_path / "before", tokenizer, kept=False)).folder
    assert run_tokenizer({"tokenizer": str(folder)}, None, step, []) is not None
    with pytest.raises(UserError, match="is not the one that"):
        run_tokenizer({"tokenizer": str(other)}, None, step, [])
