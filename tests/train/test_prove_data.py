"""--verify-data: training begins on the bytes that were written, or not at all, whichever machine sees others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import pretrain
from engine.comm.comm import TorchComm
from engine.config import Layout
from engine.data.indexed import IndexedWriter
from engine.errors import UserError
from engine.mesh import rank_grid
from engine.train import prove_data as room
from engine.train.entry import only_told
from engine.train.job import prepare
from engine.train.place import Place
from engine.train.request import EntryPoint, read_request

FACTS = {"format": "triax-corpus", "version": 1, "tokenizer": {"hash": "abc", "vocab_size": 101}, "eod_id": 2,
         "counts": {"documents": 60, "tokens": 3000}}


def write(prefix: Path, facts: dict[str, Any] | None = FACTS, damaged: bool = False) -> str:
    """60 documents of 50 tokens; `damaged` flips a bit that no other check would find."""
    with IndexedWriter(prefix, 101) as writer:
        for number in range(60):
            writer.add_document((torch.arange(50) * (number + 3) % 97).numpy())
        writer.finish(facts)
    if damaged:
        content = bytearray(Path(f"{prefix}.bin").read_bytes())
        content[1000] ^= 1
        Path(f"{prefix}.bin").write_bytes(content)
    return str(prefix)


def flags(data: str, *more: str) -> list[str]:
    return [*runs.MODEL, "--steps", "1", "--device", "cpu", "--data", data, "--verify-data", *more]


def test_a_damaged_corpus_is_refused_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = write(tmp_path / "whole"), write(tmp_path / "damaged", damaged=True)
    out = tmp_path / "out"
    for data in (flags(damaged, "--out", str(out)), flags(f"{whole}:1,{damaged}:1", "--out", str(out)),
                 flags(whole, "--valid-data", damaged, "--out", str(out)), flags(damaged, "--check")):
        assert pretrain.main(data) == runs.BAD_INPUT
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and "damaged.bin: bytes 0 to 5,999 do not match their checksum" in said
    assert not out.exists()


def test_one_rank_of_many_proves_for_a_check_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = write(tmp_path / "damaged", damaged=True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    entry = EntryPoint("engine.pretrain", {}, pretrain.check_data)
    request = read_request(entry, flags(damaged, "--check"))
    place = Place(0, 2, 0, 2)
    with pytest.raises(UserError, match="damaged.bin: bytes 0 to 5,999 do not match their checksum"):
        only_told(prepare(request, place), place, request, pretrain.make_feed)


def test_what_nothing_proves_is_said_and_trained_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, bare = write(tmp_path / "whole"), write(tmp_path / "bare", facts=None)
    assert pretrain.main(flags(f"{whole}:1,{bare}:1", "--valid-data", whole)) == 0
    said = capfd.readouterr().out
    assert f"nothing proves the bytes of {bare}: {bare}.json is not there" in said
    assert "MB match their checksums" in said and "of a corpus that is trained on too" in said
    assert f"--data: {bare} holds the same as {whole}" in said


def test_resuming_does_not_check_again_unasked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = flags(write(tmp_path / "c"), "--out", str(tmp_path / "out"))
    assert pretrain.main(data) == 0 and "match their checksums" in capfd.readouterr().out
    assert pretrain.main(["--out", str(tmp_path / "out"), "--resume", "--steps", "2"]) == 0
    assert "match their checksums" not in capfd.readouterr().out


def found_by(rank: int, world: int, *, prefixes: list[str], reads: list[bool], slices: float) -> list[str]:
    """What a rank hears, and the error it ends with; each sees a corpus of its own, as on disks of their own."""
    room.SLICE_SECONDS = slices
    said: list[str] = []
    comm = TorchComm(rank_grid(Layout(dp=world)).reshape(-1).tolist(), rank, None)
    try:
        room.prove_data([prefixes[rank]], reads=reads[rank], world=comm, device=torch.device("cpu"), say=said.append)
    except UserError as error:
        said.append(f"error: {error}")
    return said


def test_all_ranks_learn_what_one_machine_finds(ranks: Any, tmp_path: Path) -> None:
    whole, damaged = write(tmp_path / "whole"), write(tmp_path / "damaged", damaged=True)
    lost, bare = write(tmp_path / "lost"), write(tmp_path / "bare", facts=None)
    Path(f"{lost}.json").write_text(json.dumps(FACTS | {"crc32": "00000000"}))
    for bad, word in ((damaged, "damaged.bin: bytes 0 to 5,999"), (lost, 'does not match its own "crc32"')):
        for slices in (0.0, 1.0):
            results = ranks(3, found_by, prefixes=[whole, whole, bad], reads=[True, False, True], slices=slices)
            assert len({lines[-1] for lines in results}) == 1
            assert word in results[0][-1] and "(rank 2 on " in results[0][-1]
    results = ranks(3, found_by, prefixes=[whole, damaged, bare], reads=[True, False, True], slices=0.0)
    assert ["match their checksums" in lines[-1] for lines in results] == [True, True, False]


def test_two_processes_say_it_in_one_line(tmp_path: Path) -> None:
    damaged = write(tmp_path / "damaged", damaged=True)
    run = runs.start_ranks(tmp_path / "out", flags(damaged), world=2)
    try:
        codes = [rank.wait(60) for rank in run.ranks]
        said = [line for line in run.log.read_text().splitlines() if "error:" in line]
        assert codes == [runs.BAD_INPUT] * 2 and "Traceback" not in run.log.read_text()
        assert all("damaged.bin: bytes 0 to 5,999" in line for line in said) and said
    finally:
        run.kill()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_file_of_text_is_told_from_a_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    for more in ((), ("--check",)):
        assert pretrain.main([*flags(str(tmp_path / "rows.csv")), *more]) == runs.BAD_INPUT
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and "rows.csv is a file of text, not the prefix of a dataset" in said
