"""The serving folder of a checkpoint of ours: config, tokenizer and chat template, read by transformers; no padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import Entry, alone, save_checkpoint
from engine.config import ModelConfig, RunConfig, to_dict
from engine.data.chat import CHATML_TEMPLATE, ChatEncoder, Message
from engine.hf import assets_for
from engine.hf.convert import convert
from engine.model import Decoder, Parts
from engine.parallel.collectives import TensorParallel
from engine.parallel.init import initialize
from engine.parallel.sharding import pieces, shard_of
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.train import train

CONFIG = ModelConfig(layers=2, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, head_dim=8, vocab_size=331)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small vocabulary of ours, with ChatML's pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = [f"the {n} quick brown foxes jump over {n * 7} lazy dogs, again and again" for n in range(400)]
    train(lambda: text, folder / "out", vocab_size=CONFIG.vocab_size)
    return load_tokenizer(str(folder / "out"))


def content(assets: object, name: str) -> bytes:
    """The bytes of one of the files."""
    held = assets[name]  # type: ignore[index]
    return held if isinstance(held, bytes) else held.read_bytes()


def test_the_files_name_every_id_and_carry_the_tokenizer_unchanged(tokenizer: Tokenizer) -> None:
    assets = assets_for(CONFIG, tokenizer, "bf16")
    config = json.loads(content(assets, "config.json"))
    end = tokenizer.token_id("<|im_end|>")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["vocab_size"] == CONFIG.vocab_size
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert json.loads(content(assets, "generation_config.json"))["eos_token_id"] == [tokenizer.eos_id, end]
    for name in ("tokenizer.model", "tokenizer.json"):
        assert content(assets, name) == tokenizer.files[name].read_bytes()
    settings = json.loads(content(assets, "tokenizer_config.json"))
    own = json.loads(tokenizer.files["tokenizer_config.json"].read_bytes())
    assert settings == {**own, "chat_template": CHATML_TEMPLATE}
    assert content(assets, "chat_template.jinja").decode() == CHATML_TEMPLATE


def test_a_tokenizer_with_a_template_of_its_own_is_copied_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, path in tokenizer.files.items():
        (tmp_path / name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(b'{ "chat_template": "{{ messages }}",\r\n "odd": 1}')
    assets = assets_for(CONFIG, load_tokenizer(str(tmp_path)))
    assert content(assets, "tokenizer_config.json") == (tmp_path / "tokenizer_config.json").read_bytes()
    assert "chat_template.jinja" not in assets


def test_a_tokenizer_without_settings_gets_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"].read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"].read_bytes())
    settings = json.loads(content(assets_for(CONFIG, load_tokenizer(str(tmp_path))), "tokenizer_config.json"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["eos_token"] == "</s>"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_model_without_tokenizer_has_its_configs_only() -> None:
    assert set(assets_for(CONFIG, None)) == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("tp", [1, 4])
def test_padding_rows_never_leave_and_transformers_loads_the_folder_with_its_template(
        tokenizer: Tokenizer, tmp_path: Path, tp: int) -> None:
    transformers = pytest.importorskip("transformers")
    entries = []
    for rank in range(tp):
        for parameter in Decoder(Parts(CONFIG, TensorParallel(group=None, rank=rank, size=tp)), range(2)).parameters():
            initialize(parameter, 3)
            shard = shard_of(parameter)
            for member in shard.members:
                parameter.data[member.row + member.extent[0] : member.row + member.rows] = float("nan")
            entries += [Entry("model", p, parameter.detach()[p.rows[0] : p.rows[1]])
                        for p in pieces(shard, 0, parameter.shape[0])]
    meta = {"samples": 0, "config": to_dict(RunConfig(model=CONFIG)), "world": {"pp": 1, "dp": 1, "cp": 1, "tp": tp}}
    save_checkpoint(tmp_path / "run" / "checkpoints", 7, entries, rank=0, world=1, agree=alone, meta=meta,
                    assets=assets_for(CONFIG, tokenizer))
    convert(tmp_path / "run", tmp_path / "hf", to=None, dtype=None, shard_bytes=10**9, say=lambda line: None)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (CONFIG.vocab_size, CONFIG.hidden)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.token_id("<|im_end|>")]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = [{"role": "user", "content": "jump over"}, {"role": "assistant", "content": "the lazy dogs"}]
    ids = theirs.apply_chat_template(rows, return_dict=True)["input_ids"]
    assert ids == ChatEncoder(tokenizer).encode([Message(row["role"], row["content"], False) for row in rows])[0]
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.isfinite().all()
