"""Tuning as users start it: held-back rows and counted tokens are the same for every layout, and after a resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import runs

from engine.checkpoint import Entry, alone, save_checkpoint
from engine.config import ModelConfig, RunConfig, to_dict
from engine.config.flags import parse
from engine.data.fingerprint import difference
from engine.errors import UserError
from engine.finetune import check_data
from engine.finetune import main as finetune_here
from engine.model import Decoder, Parts
from engine.parallel.init import initialize
from engine.parallel.sharding import pieces, shard_of
from engine.tokenizer import load_tokenizer

CONFIG = ModelConfig(layers=2, hidden=16, ffn_hidden=32, heads=2, kv_heads=2, head_dim=8, vocab_size=600)
TUNE = "--seq-len 48 --global-batch 4 --micro-batch 2 --steps 4 --split 0.2 --eval-every 2 --dtype fp64"


def write_base(folder: Path, tokenizer: Path) -> None:
    """A run folder whose checkpoint holds an initialised model and the tokenizer."""
    entries = []
    for parameter in Decoder(Parts(CONFIG), range(CONFIG.layers)).parameters():
        initialize(parameter, 11)
        entries += [Entry("model", piece, parameter.detach()[slice(*piece.rows)])
                    for piece in pieces(shard_of(parameter), 0, parameter.shape[0])]
    save_checkpoint(
        folder / "checkpoints", 1, entries, rank=0, world=1, agree=alone,
        meta={"samples": 8, "config": to_dict(RunConfig(model=CONFIG)), "world": {"pp": 1, "dp": 1, "cp": 1, "tp": 1}},
        assets=dict(load_tokenizer(str(tokenizer)).files))


def finetune(*flags: str) -> str:
    """Tunes on one process; what it said."""
    done = runs.to_the_end("-m", "engine.finetune", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_split_and_the_tokens_are_the_same_for_every_layout_and_on_resume(tmp_path: Path, own: Path) -> None:
    write_base(tmp_path / "base", own)
    for name, rows in (("a", range(12)), ("b", range(12, 20))):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"question": f"say {n} " * (n % 3 + 1), "answer": f"{n} " * (n % 4 + 1)}) + "\n" for n in rows))
    flags = [*TUNE.split(), "--load", str(tmp_path / "base"), "--data", str(tmp_path / "a.jsonl"), "--data",
             str(tmp_path / "b.jsonl")]
    said = finetune(*flags, "--out", str(tmp_path / "alone"))
    assert "20 rows, 0 dropped" in said and "held back: 4 rows of --data, 4 read" in said
    two = runs.start_ranks(tmp_path / "two", [*flags, "--stop-after", "2"], world=2, program=("-m", "engine.finetune"))
    assert two.codes() == [0, 0], two.said()
    finetune("--resume", "--out", str(tmp_path / "two"))
    wanted, found = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    assert [line["step"] for line in wanted if "valid_loss" in line] == [2, 4]
    for ours, theirs in zip(wanted, found, strict=True):
        assert 0 < ours["supervised"] < ours["tokens"] < 4 * 48
        for key in ("step", "tokens", "supervised"):
            assert ours[key] == theirs[key]
        for key in {"loss", "grad_norm", "valid_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10)
    assert (tmp_path / "alone" / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()


def test_other_rows_held_back_or_keys_left_out_are_other_data(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"question": f"{n}", "answer": "a", "note": "n", "more": n + 1}) + "\n" for n in range(20)))

    def looked_at(flags: str) -> Any:
        return json.loads(json.dumps(check_data(parse(["--load", "x", "--data", str(rows), *flags.split()]))))

    then = looked_at("--ignore-keys note --split 0.1")
    assert difference(then, looked_at("--split 0.1 --ignore-keys note")) is None
    assert "with split 0.1, and" in str(difference(then, looked_at("--ignore-keys note --split 0.2")))
    assert "with ignored keys ['note'], and" in str(difference(then, looked_at("--ignore-keys note,more --split 0.1")))
    with pytest.raises(UserError, match="--ignore-keys x,y: no row holds anything under that name"):
        looked_at("--ignore-keys y,note,x")
    with pytest.raises(UserError, match='rows.jsonl, line 1: "note" holds content'):
        looked_at("")
    rows.write_text(json.dumps({"question": "q", "answer": ""}))
    with pytest.raises(UserError, match="none of its 1 rows has anything to learn"):
        looked_at("")


def test_held_back_rows_that_are_learned_too_are_said(tmp_path: Path, own: Path,
                                                      capfd: pytest.CaptureFixture[str]) -> None:
    write_base(tmp_path / "base", own)
    for name, rows in (("a", range(4)), ("copy", range(4)), ("held", range(3, 6))):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"question": f"say {n}", "answer": f"{n}"}) + "\n" for n in rows))
    a, copy, held = (str(tmp_path / f"{name}.jsonl") for name in ("a", "copy", "held"))
    flags = [*TUNE.split(), "--split", "0", "--load", str(tmp_path / "base"), "--steps", "1", "--valid-data", held]
    assert finetune_here([*flags, "--data", f"{a},{copy}"]) == 0
    said = capfd.readouterr().out
    assert "held back: 3 rows of --valid-data, 3 read in an evaluation; 1 of them are learned from too" in said
    assert f"--data: {copy} holds the same as {a}" in said
