"""transformers' models come in and go out again bit for bit, and compute the same in the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import Entry, load_weights, open_checkpoint, resolve
from engine.errors import UserError
from engine.hf import open_hf, read_config
from engine.hf.convert import convert, open_model, plan_shards
from engine.hf.verify import verify
from engine.model import Decoder, Parts
from engine.model.shapes import logical_shapes
from engine.parallel.collectives import TensorParallel
from engine.parallel.sharding import pieces, shard_of

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
VOCAB = 131
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(SIZES, rope_theta=50000.0, rms_norm_eps=1e-5)),
    "llama-tied": ("LlamaConfig", dict(SIZES, tie_word_embeddings=True)),
    "llama-biases": ("LlamaConfig", dict(SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralConfig", dict(SIZES, sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2Config", dict(SIZES, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(SIZES, head_dim=16)),
    "gpt2": ("GPT2Config", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
                                eos_token_id=2)),
}


def make(name: str, folder: Path, **more: Any) -> Path:
    """A random model of transformers, every weight away from its initial constant, saved to a folder."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**settings, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.float().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decoder(folder: Path, tp: TensorParallel | None = None) -> Decoder:
    """The engine's model with the weights of an HF folder; padding rows keep NaN."""
    source = open_hf(folder)
    model = Decoder(Parts(source.config, tp or TensorParallel()), range(source.config.layers))
    entries = []
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
        entries += [Entry("model", p, parameter.data[p.rows[0] : p.rows[1]])
                    for p in pieces(shard_of(parameter), 0, parameter.shape[0])]
    load_weights(source, entries, logical_shapes(source.config))
    return model


def run(load: Path, save: Path, **more: Any) -> Path:
    """Converts with defaults."""
    convert(load, save, **{"to": None, "dtype": None, "shard_bytes": 5 * 10**9, "say": lambda line: None, **more})
    return save


@pytest.mark.parametrize("name", CONFIGS)
def test_in_and_out_again_is_bit_exact_and_both_sides_give_the_same_logits(tmp_path: Path, name: str) -> None:
    source = make(name, tmp_path / "hf")
    run(source, tmp_path / "run")
    back = run(tmp_path / "run", tmp_path / "back")
    before, after = stored(source), stored(back)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert read_config(source) == replace(read_config(back), model="hf")
    for one, other in ((source, tmp_path / "run"), (tmp_path / "run", back)):
        lines: list[str] = []
        assert verify(one, other, None, lines.append), lines
        assert lines[0].startswith("equal") and lines[1].startswith("logits: equal")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_config_survives_the_round_trip(tmp_path: Path, name: str) -> None:
    back = run(run(make(name, tmp_path / "hf"), tmp_path / "run"), tmp_path / "back")
    one, other = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (tmp_path / "hf", back))
    # Dropouts are no part of the network; n_inner null means 4 n_embd; torch_dtype is dtype's older spelling.
    unlike = {"_name_or_path", "transformers_version", "n_ctx", "n_inner", "torch_dtype", "rope_theta", "rope_scaling",
              "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    assert {k: v for k, v in one.items() if k not in unlike} == {k: v for k, v in other.items() if k not in unlike}
    content = json.loads((back / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == "float32" and content["vocab_size"] == VOCAB
    assert name == "gpt2" or ("rope_theta" in content and content["rope_scaling"] is None)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_tensor_parallel_rank_gets_its_slices(tmp_path: Path, name: str) -> None:
    """Loading at tp 4 (kv heads repeat) gives the rows and columns that the descriptions name; nothing else changes."""
    folder = make(name, tmp_path / "hf")
    whole = {m.name: p.detach()[m.row : m.row + m.extent[0]] for p in decoder(folder).parameters()
             for m in shard_of(p).members}
    for rank in range(4):
        for parameter in decoder(folder, TensorParallel(group=None, rank=rank, size=4)).parameters():
            for member in shard_of(parameter).members:
                window = tuple(slice(a, a + n) for a, n in zip(member.start, member.extent, strict=True))
                rows = parameter.detach()[member.row : member.row + member.rows]
                assert torch.equal(rows[: member.extent[0]], whole[member.name][window])
                assert rows[member.extent[0] :].isnan().all()


def test_the_loss_of_transformers_is_the_engines(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "hf")
    ids = torch.randint(VOCAB, (3, 33))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss
        model = decoder(folder)
        for parameter in model.parameters():
            parameter.nan_to_num_(0.0)
        ours = model.losses(model(ids[:, :-1]), ids[:, 1:]).mean()
    assert abs(float(ours) - float(theirs)) < 1e-5


def test_shards_hold_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "hf")
    back = run(run(source, tmp_path / "run"), tmp_path / "back", shard_bytes=30_000)
    files = sorted(back.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2 and all(sum(t.nbytes for t in load_file(f).values()) <= 30_000 for f in files)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(source).values())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert torch.equal(model.lm_head.weight, stored(source)["lm_head.weight"])
    assert [len(s) for s in plan_shards([], 10)] == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cast_is_verified_after_the_cast(tmp_path: Path, dtype: str) -> None:
    source, lines = make("qwen3", tmp_path / "hf"), []
    run(source, tmp_path / "run", dtype=dtype)
    assert verify(source, tmp_path / "run", dtype, lines.append), lines
    back = run(source, tmp_path / "back", to="hf", dtype=dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert all(torch.equal(t.to(kind), stored(back)[n]) for n, t in stored(source).items())
    assert json.loads((back / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_values_beyond_fp16_are_refused_not_made_infinite(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "hf")
    tensors = stored(source)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight has values up to 1e"):
        run(source, tmp_path / "run", dtype="fp16")
    assert not (tmp_path / "run").exists() and len(list(tmp_path.iterdir())) == 1


def test_verify_finds_one_changed_bit(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "hf")
    run(source, tmp_path / "run")
    tensors = stored(source)
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, source / "model.safetensors")
    lines: list[str] = []
    assert not verify(source, tmp_path / "run", None, lines.append)
    assert lines == ["not equal: 1 of 21 tensors differ: model.layers.1.mlp.up_proj.weight"]


def test_what_is_made_is_a_run_folder_that_loads(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "hf")
    odd = b'{"version":  "1.0", "model": {"type": "BPE", "vocab": {"a\\u00e9":  0}, "merges": []}}\r\n'
    (source / "tokenizer.json").write_bytes(odd)
    run(source, tmp_path / "run")
    found = resolve(tmp_path / "run")
    checkpoint = open_checkpoint(found.folder)
    assert (found.kind, checkpoint.step, checkpoint.samples, checkpoint.kinds) == ("run", 0, 0, ("model",))
    assert checkpoint.source().shapes == logical_shapes(read_config(source))
    back = run(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_export_needs_nothing_but_the_step_folder(tmp_path: Path) -> None:
    run(make("llama", tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000000").rename(tmp_path / "moved")
    back = run(tmp_path / "moved", tmp_path / "back")
    assert open_model(back).kind == "hf"


def test_output_in_the_way_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to(source)
    for save, words in (("hf", "lie in each other"), ("hf/inner", "lie in each other"), ("full", "not empty"),
                        ("full/x", "there already"), ("link", "lie in each other"), ("full/x/y", "cannot be written")):
        with pytest.raises(UserError, match=words):
            run(source, tmp_path / save)
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "hf", "link"]


@pytest.mark.slow
def test_the_command_converts_verifies_and_names_its_errors(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "hf")
    command = [sys.executable, str(ROOT / "tools" / "convert_ckpt.py"), "--load", str(source), "--save"]
    done = subprocess.run([*command, str(tmp_path / "run"), "--verify"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and "bit for bit" in done.stdout and "logits: equal" in done.stdout
    done = subprocess.run([*command, str(tmp_path / "run")], cwd="/", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --save") and done.stderr.count("\n") == 1
