"""Hostile and damaged Hugging Face folders: one clear UserError each, which names the key, the file or the tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import resolve
from engine.checkpoint.strict_json import parse_object
from engine.config import ModelConfig
from engine.errors import UserError
from engine.hf import TokenIds, config_from_hf, config_to_hf, open_hf, read_config
from engine.hf.config import FAMILIES
from engine.hf.convert import convert
from engine.hf.serving import read_token_ids
from engine.model.shapes import logical_shapes

TINY = ModelConfig(layers=2, hidden=8, ffn_hidden=12, heads=2, kv_heads=1, head_dim=4, vocab_size=11)
GPT2 = replace(TINY, family="gpt2", kv_heads=2, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True)


def tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights under HF names."""
    shapes = logical_shapes(config)
    return {name: torch.randn(held.shape(shapes)) for name, held in FAMILIES[config.family].tensors(config).items()}


def write(folder: Path, config: ModelConfig, shards: int = 1) -> Path:
    """An HF folder of a model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, TokenIds())))
    weights = tensors(config)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    table = {name: files[i % shards] for i, name in enumerate(weights)}
    for file in files:
        save_file({name: tensor for name, tensor in weights.items() if table[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


LLAMA_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"hidden_size": "8"}, "hidden_size '8' is not a whole number"),
    "float": ({"num_hidden_layers": 2.0}, "num_hidden_layers '2.0' is not a whole number"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers 'True' is not a whole"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers '0' is not a whole number from 1"),
    "negative": ({"vocab_size": -5}, "vocab_size '-5'"),
    "absurd": ({"vocab_size": 10**12}, "vocab_size '1000000000000'"),
    "absurd together": ({"vocab_size": 1 << 24, "hidden_size": 1 << 20, "num_hidden_layers": 9999}, "beyond any model"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 is not divisible by num_key_value_heads 2"),
    "no head_dim": ({"num_attention_heads": 3, "head_dim": None}, "hidden_size 8 is not divisible"),
    "odd head_dim": ({"head_dim": 3}, "head_dim 3 is odd"), "missing": ({"hidden_size": None}, "has no hidden_size"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps '0' is not a number above 0"),
    "infinite": ({"rope_theta": 1e400}, "rope_theta 'inf' is not a number"),
    "flag": ({"tie_word_embeddings": "true"}, "tie_word_embeddings 'true' is not true or false"),
    "scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling 'llama3' is not supported"),
    "old scaling": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling 'linear' is not supported"),
    "new scaling": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters 'yarn'"),
    "scaling list": ({"rope_scaling": [1]}, "rope_scaling '.1.' is not a table"),
    "two thetas": ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 10000.0 and 5.0"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "code": ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "type": ({"model_type": "lama"}, "'lama' is not supported; Triax computes llama, mistral"),
    "type list": ({"model_type": [["x"]]}, "is not supported"),
    "window": ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16 is not supported"),
    "window text": ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window 'x'"),
    "window qwen": ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
    "layer types": ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
}


@pytest.mark.parametrize("name", LLAMA_KEYS)
def test_a_config_we_cannot_compute_is_refused_by_key(name: str) -> None:
    change, words = LLAMA_KEYS[name]
    with pytest.raises(UserError, match=words):
        config_from_hf({**config_to_hf(TINY, TokenIds()), **change})


@pytest.mark.parametrize(("change", "words"), [
    ({"activation_function": "relu"}, "activation_function"), ({"n_head": 3}, "n_embd 8 is not divisible by n_head 3"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"), ({"n_inner": 0}, "n_inner"),
    ({"add_cross_attention": True}, "add_cross_attention"), ({"n_positions": None}, "has no n_positions")])
def test_a_gpt2_config_we_cannot_compute_is_refused_by_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_from_hf({**config_to_hf(GPT2, TokenIds()), **change})


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff\xfe", b'{"a":-Infinity}',
                                  b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"a":' + b"1" * 10_000 + b"}"])
def test_a_config_that_is_no_plain_json_is_refused(text: bytes) -> None:
    with pytest.raises(UserError, match="config.json"):
        parse_object(text, "config.json")


@pytest.mark.parametrize("config", [
    replace(TINY, qkv_bias=True, qk_norm=True), replace(TINY, out_bias=True), replace(GPT2, mlp_bias=False),
    replace(GPT2, kv_heads=1), replace(TINY, mlp_bias=True, qk_norm=True)])
def test_a_network_that_no_hugging_face_class_computes_is_not_exported(config: ModelConfig) -> None:
    with pytest.raises(UserError, match="Hugging Face"):
        config_to_hf(config, TokenIds())


@pytest.mark.parametrize("config", [
    TINY, replace(TINY, tied=True, rope_theta=12345.5, norm_eps=3e-6), replace(TINY, qkv_bias=True),
    replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True), replace(TINY, qk_norm=True, head_dim=16),
    replace(TINY, qk_norm=True, qkv_bias=True, out_bias=True), GPT2, replace(GPT2, tied=False, ffn_hidden=20)])
def test_config_to_hf_and_back_is_the_same_network(config: ModelConfig) -> None:
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, TokenIds(1, (2, 3), 0))))) == config


def test_the_new_rope_keys_are_read_too() -> None:
    content = config_to_hf(replace(TINY, rope_theta=777.0), TokenIds())
    del content["rope_theta"]
    content["rope_parameters"] = {"rope_theta": 777.0, "rope_type": "default"}
    assert config_from_hf(content).rope_theta == 777.0


def index_of(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Changes the index's weight_map."""
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


NORM = "model.norm.weight"
INDEXES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "parent": (lambda t: t.update({NORM: "../../secret.safetensors"}), "is not a plain file name"),
    "absolute": (lambda t: t.update({NORM: "/etc/passwd"}), "is not a plain file name"),
    "folder": (lambda t: t.update({NORM: "."}), "is not a plain file name"),
    "missing shard": (lambda t: t.update({NORM: "model-00009-of-00009.safetensors"}), "00009.safetensors is missing"),
    "missing tensor": (lambda t: t.update({"extra": t[NORM]}), "do not agree on extra"),
    "unlisted tensor": (lambda t: t.pop(NORM), f"do not agree on {NORM}"),
    "wrong shard": (lambda t: t.update({NORM: next(f for f in t.values() if f != t[NORM])}), f"do not agree on {NORM}"),
    "number": (lambda t: t.update({NORM: 1}), "has no weight_map"), "empty": (lambda t: t.clear(), "has no weight_map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    change, words = INDEXES[name]
    folder = write(tmp_path / "hf", TINY, shards=2)
    open_hf(folder)
    index_of(folder, change)
    with pytest.raises(UserError, match=words):
        open_hf(folder)


def test_a_tensor_that_stands_twice_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", GPT2)
    weights = tensors(GPT2)
    save_file({**weights, "wpe.weight": weights["transformer.wpe.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="transformer.wpe.weight stands in"):
        open_hf(folder)


def test_a_link_out_of_the_folder_is_refused_but_not_the_hub_caches(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TINY)
    os.rename(folder / "model.safetensors", tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link out of its folder"):
        open_hf(folder)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    os.rename(tmp_path / "elsewhere", cache / "blobs" / "abc")
    (folder / "model.safetensors").unlink()
    folder.rename(cache / "snapshots" / "main")
    (cache / "snapshots" / "main" / "model.safetensors").symlink_to("../../blobs/abc")
    assert open_hf(cache / "snapshots" / "main").config == replace(TINY, model="a/b")


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("model.layers.1.mlp.down_proj.weight"), r"lacks model.layers.1.mlp.down_proj.weight"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}), r"has model.layers.2.mlp.up_proj"),
    (lambda t: t.update({NORM: torch.ones(9)}), r"of shape \[9\], and the model wants \[8\]"),
    (lambda t: t.update({NORM: torch.ones(8, dtype=torch.int8)}), "stored as I8"),
    (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight")])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], object], words: str) -> None:
    folder, weights = write(tmp_path / "hf", TINY), tensors(TINY)
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=words):
        open_hf(folder)


def test_a_tied_folder_may_repeat_its_embedding_but_not_hold_another_head(tmp_path: Path) -> None:
    config = replace(TINY, tied=True)
    folder, weights = write(tmp_path / "hf", config), tensors(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert set(open_hf(folder).shapes) == set(logical_shapes(config))
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="says tie_word_embeddings, but model.safetensors holds a lm_head.weight"):
        open_hf(folder)


def test_tables_of_older_files_are_passed_over(tmp_path: Path) -> None:
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for name, config, table in (("a", TINY, rotary), ("b", GPT2, "h.1.attn.bias")):
        folder = write(tmp_path / name, config)
        old = {key.removeprefix("transformer."): tensor for key, tensor in tensors(config).items()}
        save_file({**old, table: torch.ones(2)}, folder / "model.safetensors")
        assert table not in open_hf(folder).shapes


def test_pickles_and_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TINY)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="holds both"):
        open_hf(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        resolve(folder)


def test_special_token_ids_are_checked(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TINY)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "bos_token_id": 1}')
    assert read_token_ids(folder) == TokenIds(1, (2, 7), None) and read_config(folder) == replace(TINY, model="hf")
    (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match="not whole numbers"):
        read_token_ids(folder)


@pytest.mark.parametrize(("files", "words"), [
    ({"tokenizer.json": b""}, "tokenizer.json is empty"), ({"tokenizer.json": b"{}"}, "it holds no vocabulary"),
    ({"tokenizer.model": b""}, "tokenizer.model is no sentencepiece model.*it is empty"),
    ({"vocab.json": b"", "merges.txt": b""}, "vocab.json is empty"), ({"a.tiktoken": b""}, "a.tiktoken is empty"),
])
def test_a_tokenizer_that_cannot_be_loaded_is_not_converted(tmp_path: Path, files: dict[str, bytes],
                                                            words: str) -> None:
    folder, said = write(tmp_path / "hf", TINY), []  # type: tuple[Path, list[str]]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    how: dict[str, Any] = {"to": "engine", "dtype": None, "shard_bytes": 1 << 20, "say": said.append}
    with pytest.raises(UserError, match=f"the tokenizer cannot be used: .*{words}.*mend or delete it, or say --force"):
        convert(folder, tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()
    convert(folder, tmp_path / "run", **how, force=True)
    assert "warning: the tokenizer cannot be used, and is converted as it is" in said[0]
