"""A tokenizer with more pieces than a loaded model has rows: the advice leads out, and the model grows."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import finetune, pretrain
from engine.checkpoint import latest_step, open_checkpoint
from engine.config import ModelConfig
from engine.hf import TokenIds, config_to_hf
from engine.hf.config import FAMILIES
from engine.hf.convert import convert
from engine.model.shapes import logical_shapes
from engine.tokenizer import load_tokenizer
from engine.tokenizer.extend import why_no_extension
from engine.tokenizer.train import train as train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
ROWS, PIECES = 300, 303

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    return runs.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def extended(folder: Path) -> Path:
    """Two tokenizers: one of 300 pieces, and the same with three more; returns the latter."""
    tokenizers = pytest.importorskip("tokenizers")
    train_tokenizer(lambda: iter(TEXT), folder / "small", vocab_size=ROWS)
    shutil.copytree(folder / "small", folder / "extended")
    file = folder / "extended" / "tokenizer.json"
    content = tokenizers.Tokenizer.from_file(str(file))
    content.add_tokens(["<tool>", "xyzzy"])
    content.add_special_tokens(["<|x|>"])
    content.save(str(file))
    return folder / "extended"


@pytest.fixture(scope="module")
def trained(folder: Path, data: list[str], extended: Path) -> Path:
    """A finished run of two steps with the small vocabulary."""
    flags = [*runs.MODEL, "--vocab-size", str(ROWS), "--steps", "2", *data, "--tokenizer", folder / "small"]
    done = runs.pretrain(*flags, "--out", folder / "trained")
    assert done.returncode == 0, done.stderr
    return folder / "trained"


@pytest.fixture(scope="module")
def loads(folder: Path, trained: Path, extended: Path) -> dict[str, list[str]]:
    """Ways to come to a model with fewer rows than its tokenizer has pieces."""
    convert(trained, folder / "hf", to="hf", dtype=None, shard_bytes=10**9, say=lambda line: None)
    shutil.copytree(folder / "hf", folder / "edited")
    shutil.copy(extended / "tokenizer.json", folder / "edited" / "tokenizer.json")
    given = ["--tokenizer", str(extended)]
    return {"run": ["--load", str(trained), *given], "hf": ["--load", str(folder / "hf"), *given],
            "edited": ["--load", str(folder / "edited")]}


def said(capsys: pytest.CaptureFixture[str], *flags: str | Path, code: int = runs.BAD_INPUT) -> str:
    """The one line on stderr of a check; none where the check passes."""
    assert pretrain.main([*map(str, flags), "--check"]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == (1 if code else 0), line
    return line


@pytest.mark.parametrize("kind", ["run", "hf", "edited"])
def test_the_advice_leads_to_a_run(capsys: pytest.CaptureFixture[str], loads: dict[str, list[str]], data: list[str],
                                   tmp_path: Path, kind: str) -> None:
    flags = [*loads[kind], *data, "--seq-len", "32"]
    line = said(capsys, *flags)
    assert f"the tokenizer has {PIECES} pieces, and the model in " in line and f"{ROWS} rows for them; " in line
    assert f"--vocab-size {PIECES} grows it: each new row is the mean of the old ones" in line
    assert f"use --vocab-size {PIECES}" in said(capsys, *flags, "--vocab-size", "200")
    assert f"--vocab-size {PIECES} grows it" in said(capsys, *flags, "--vocab-size", "301")
    said(capsys, *flags, "--vocab-size", str(PIECES), code=0)
    said(capsys, *flags, "--vocab-size", "320", code=0)
    row = {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the fox"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = ["--data", str(tmp_path / "rows.jsonl"), "--vocab-size", str(PIECES)]
    assert finetune.main([*loads[kind], *rows, "--check"]) == 0


def test_rows_are_never_dropped(capsys: pytest.CaptureFixture[str], trained: Path, data: list[str]) -> None:
    line = said(capsys, "--load", trained, *data, "--vocab-size", "299")
    assert f"--vocab-size 299 is less than the {ROWS} rows of the model in" in line and "leave the flag out" in line


def test_a_run_that_is_resumed_does_not_grow(capsys: pytest.CaptureFixture[str], trained: Path, extended: Path,
                                             data: list[str]) -> None:
    before = ["--out", trained, "--resume", *data, "--steps", "4"]
    assert f"--vocab-size {PIECES} contradicts" in said(capsys, *before, "--vocab-size", str(PIECES))
    line = said(capsys, *before, "--tokenizer", extended)
    assert "leave the flag out" in line and "--vocab-size" not in line


def test_learned_positions_do_not_grow(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: list[str]) -> None:
    model = ModelConfig(family="gpt2", layers=1, hidden=32, ffn_hidden=64, heads=4, kv_heads=4, head_dim=8, tied=True,
                        vocab_size=101, max_positions=48, qkv_bias=True, out_bias=True, mlp_bias=True)
    shapes = logical_shapes(model)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model, TokenIds())))
    save_file({name: torch.zeros(held.shape(shapes)) for name, held in FAMILIES["gpt2"].tensors(model).items()},
              tmp_path / "model.safetensors")
    said(capsys, "--load", tmp_path, *data, "--seq-len", "48", code=0)
    line = said(capsys, "--load", tmp_path, *data, "--seq-len", "64", "--max-positions", "64")
    assert "--max-positions 64 contradicts" in line and "has 48; leave the flag out" in line


def test_only_a_vocabulary_with_the_same_pieces_takes_the_place_of_the_models(
        capsys: pytest.CaptureFixture[str], folder: Path, extended: Path, trained: Path, data: list[str]) -> None:
    small, large = (load_tokenizer(str(path)) for path in (folder / "small", extended))
    assert (small.vocab_size, large.vocab_size) == (ROWS, PIECES)
    assert why_no_extension(large, small) is None
    assert why_no_extension(small, large) == f"it has {ROWS} pieces, and that one {PIECES}"
    train_tokenizer(lambda: iter([*TEXT, "zebra quartz vexing jumps"] * 3), folder / "other", vocab_size=320)
    assert str(why_no_extension(load_tokenizer(str(folder / "other")), small)).startswith("id ")
    line = said(capsys, "--load", trained, *data, "--tokenizer", folder / "other", "--vocab-size", "320")
    assert re.search("nor that one with pieces added: id [0-9]+ is [0-9]+ '.*', and was [0-9]+ '", line)


def test_added_pieces_that_take_over_a_role_are_refused_by_the_role(
        capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: Path, extended: Path, data: list[str]) -> None:
    shutil.copytree(extended, tmp_path / "roles")
    file = tmp_path / "roles" / "tokenizer_config.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, "eos_token": "<|x|>"}))
    line = said(capsys, "--load", trained, *data, "--tokenizer", tmp_path / "roles", "--vocab-size", str(PIECES))
    assert f"nor that one with pieces added: its eos is {PIECES - 1} '<|x|>', and was 2 '</s>'; give one" in line


@pytest.mark.slow
def test_a_grown_model_trains_resumes_and_is_exported(folder: Path, loads: dict[str, list[str]], data: list[str],
                                                      extended: Path) -> None:
    flags = [*loads["hf"], *data, "--vocab-size", str(PIECES), "--steps", "3", "--seq-len", "32", "--global-batch", "4"]
    done = runs.pretrain(*flags, "--out", folder / "whole")
    assert done.returncode == 0, done.stderr
    assert "vocabulary grown from 300 to 303 rows: each new one is the mean of the old ones" in done.stdout
    assert "the same 300 pieces and 3 more" in done.stdout
    assert runs.pretrain(*flags, "--out", folder / "parts", "--stop-after", "1").returncode == 0
    done = runs.pretrain("--out", folder / "parts", "--resume")
    assert done.returncode == 0 and "grown" not in done.stdout, done.stderr
    runs.assert_same_run(folder / "parts", folder / "whole")
    step = latest_step(folder / "parts")
    assert step is not None
    assert open_checkpoint(step).tensors["model/lm_head.weight"].shape == (PIECES, 32)
    convert(folder / "parts", folder / "exported", to="hf", dtype=None, shard_bytes=10**9, say=lambda line: None)
    exported = load_tokenizer(str(folder / "exported"))
    assert exported.hash == load_tokenizer(str(extended)).hash and exported.token_id("<|x|>") == PIECES - 1


def test_a_model_without_chat_pieces_is_tuned_as_the_advice_says(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                                 data: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    train_tokenizer(lambda: iter(TEXT), tmp_path / "bare", vocab_size=ROWS, special=())
    run = str(tmp_path / "run")
    assert pretrain.main([*runs.MODEL, "--vocab-size", str(ROWS), "--steps", "1", *data, "--tokenizer",
                          str(tmp_path / "bare"), "--out", run]) == 0
    row = {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the fox"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--load", run, "--data", str(tmp_path / "rows.jsonl"), "--check"]
    capsys.readouterr()
    assert finetune.main(flags) == runs.BAD_INPUT
    line = capsys.readouterr().err
    assert "the tokenizer has no <|im_start|> and <|im_end|>" in line and line.count("\n") == 1
    assert "takes its own tokenizer with the two added, --tokenizer DIR --vocab-size N" in line
    own = tmp_path / "run" / "checkpoints" / "step-00000001" / "hf"
    shutil.copytree(own, tmp_path / "two")
    file = tmp_path / "two" / "tokenizer.json"
    content = tokenizers.Tokenizer.from_file(str(file))
    content.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    content.save(str(file))
    assert finetune.main([*flags, "--tokenizer", str(tmp_path / "two"), "--vocab-size", str(ROWS + 2)]) == 0
