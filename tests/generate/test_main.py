"""The command: from a folder to text, raw and as chat, and one clear line for what cannot be."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Entry, alone, save_checkpoint
from engine.config import ModelConfig, RunConfig, to_dict
from engine.data.chat import ChatEncoder, Message
from engine.errors import UserError
from engine.generate import begin, generate, load_for_inference, main, stop_ids
from engine.hf.convert import convert
from engine.model import Decoder, Parts
from engine.parallel.init import initialize
from engine.parallel.sharding import pieces, shard_of
from engine.tokenizer import load_tokenizer
from engine.tokenizer.train import train

CONFIG = ModelConfig(layers=2, hidden=32, ffn_hidden=56, heads=4, kv_heads=2, head_dim=8, vocab_size=411,
                     max_positions=96, init_std=0.3)
CPU = torch.device("cpu")


def write_run(folder: Path, tokenizer: Path, config: ModelConfig = CONFIG) -> Decoder:
    """A run folder whose latest checkpoint holds an initialised model and the tokenizer; returns the model."""
    model = Decoder(Parts(config), range(config.layers))
    entries = []
    for parameter in model.parameters():
        initialize(parameter, 11)
        entries += [Entry("model", piece, parameter.detach()[slice(*piece.rows)])
                    for piece in pieces(shard_of(parameter), 0, parameter.shape[0])]
    save_checkpoint(
        folder / "checkpoints", 1, entries, rank=0, world=1, agree=alone,
        meta={"samples": 8, "config": to_dict(RunConfig(model=config)), "world": {"pp": 1, "dp": 1, "cp": 1, "tp": 1}},
        assets=dict(load_tokenizer(str(tokenizer)).files))
    return model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(lambda: [Path(argparse.__file__).read_text("utf-8")], folder, vocab_size=411)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tokenizer_folder)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_the_command_prints_what_generate_gives(run: Path, chat: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, config, tokenizer = load_for_inference(str(run), torch.float32, CPU)
    assert config == CONFIG
    prompt = ChatEncoder(tokenizer).prompt([Message("user", "def f")]) if chat else begin(tokenizer, "def f")
    ids = list(generate(model, prompt, max_tokens=40, temperature=0.0))
    text = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
    flags = ["--load", str(run), "--prompt", "def f", "--max-tokens", "40", "--greedy", "--device", "cpu"]
    assert main([*flags, "--chat"] if chat else flags) == 0
    printed = capsys.readouterr()
    assert printed.out == text + "\n"
    assert f"{len(prompt)} prompt tokens, 40 generated" in printed.err


def test_loading_a_checkpoint_gives_the_weights_bit_for_bit(run: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    written = write_run(tmp_path / "again", tokenizer_folder)
    for folder in (run, tmp_path / "again" / "checkpoints" / "step-00000001"):
        loaded, _, _ = load_for_inference(str(folder), torch.float32, CPU)
        for ours, theirs in zip(loaded.parameters(), written.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_hugging_face_folder_speaks_as_transformers_does(tokenizer_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=411, max_position_embeddings=96, initializer_range=0.3, bos_token_id=1, eos_token_id=None)).double()
    theirs.save_pretrained(tmp_path)
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model, _, tokenizer = load_for_inference(str(tmp_path), torch.float64, CPU)
    ids = begin(tokenizer, "import sys")
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    assert list(generate(model, ids, max_tokens=40, temperature=0.0)) == expected


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_of_an_answer_that_the_folder_names_stops_it(
        run: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, tokenizer = load_for_inference(str(run), torch.float32, CPU)
    ids = list(generate(model, begin(tokenizer, "def f"), max_tokens=40, temperature=0.0))
    stop = next(token for token in ids[10:] if ids.index(token) >= 10)
    convert(run, tmp_path / "hf", to="hf", dtype=None, shard_bytes=10**9, say=lambda line: None)
    content = json.loads((tmp_path / "hf" / "config.json").read_text()) if file == "config.json" else {}
    (tmp_path / "hf" / file).write_text(json.dumps({**content, "eos_token_id": [2, stop]}))
    assert stop_ids(str(tmp_path / "hf"), tokenizer) == {tokenizer.eos_id, tokenizer.token_id("<|im_end|>"), 2, stop}
    assert main(["--load", str(tmp_path / "hf"), "--prompt", "def f", "--max-tokens", "40", "--greedy", "--device",
                 "cpu"]) == 0
    assert f"{ids.index(stop)} generated" in capsys.readouterr().err


def test_a_tied_gpt2_loads_and_speaks(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(**{**vars(CONFIG), "family": "gpt2", "kv_heads": 4, "tied": True, "qkv_bias": True,
                            "out_bias": True, "mlp_bias": True})
    written = write_run(tmp_path, tokenizer_folder, config)
    loaded, _, _ = load_for_inference(str(tmp_path), torch.float32, CPU)
    texts = [list(generate(model, [5, 6], max_tokens=20, temperature=0.0)) for model in (written, loaded)]
    assert texts[0] == texts[1]


def test_the_prompt_can_come_from_standard_input(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load", str(run), "--max-tokens", "8", "--seed", "4", "--device", "cpu", "--prompt"]
    main([*flags, "class A"])
    given = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"class A\n")))
    main([*flags, "-"])
    assert capsys.readouterr().out == given


def test_bf16_speaks_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--load", str(run), "--prompt", "x", "--max-tokens", "8", "--dtype", "bf16", "--device", "cpu"]
    assert main(flags) == 0 and capsys.readouterr().out


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path, tokenizer_folder, ModelConfig(**{**vars(CONFIG), "vocab_size": 300}))
    with pytest.raises(UserError, match="411 entries, the model 300"):
        load_for_inference(str(tmp_path), torch.float32, CPU)


def test_the_process_ends_with_one_line_and_code_2(run: Path) -> None:
    command = [sys.executable, "-m", "engine.generate", "--load", str(run), "--prompt", "x", "--max-tokens", "500"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "96 positions; use --max-tokens 1 to" in done.stderr
    assert done.stderr.count("\n") == 1
