"""Ranks that were started for different runs never train together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine.checkpoint import Checkpoint, Resolved
from engine.checkpoint.manifest import LogicalTensor, Manifest, Slice
from engine.config.flags import build
from engine.errors import UserError
from engine.train.same_run import refuse_another_run
from engine.train.start import Start

DATA = [{"path": "/here/corpus", "tokens": 2000, "bin_crc32": 7}]


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_ranks_of_one_run_agree_wherever_its_files_lie(store: dist.Store) -> None:
    refuse_another_run(build({"lr": 1e-3, "out": "/a", "data": "/here/corpus"}), DATA, 0, 1, store)
    elsewhere = [{**DATA[0], "path": "/there/corpus"}]
    refuse_another_run(build({"lr": 1e-3, "out": "/b", "data": "/there/corpus"}), elsewhere, 1, 2, store)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("lr", 1e-2, "rank 1 was started with --lr 0.01, and rank 0 with --lr 0.0003"),
    ("seed", 7, "--seed 7, and rank 0 with --seed 1234"), ("steps", 12, "--steps 12"), ("tp", 2, "--tp 2")])
def test_a_rank_with_another_flag_is_refused_by_name(store: dist.Store, name: str, value: float, said: str) -> None:
    refuse_another_run(build({}), (), 0, 1, store)
    with pytest.raises(UserError, match=said):
        refuse_another_run(build({name: value}), (), 1, 2, store)


def test_a_rank_with_a_stale_copy_of_the_data_is_refused(store: dist.Store) -> None:
    refuse_another_run(build({}), DATA, 0, 1, store)
    with pytest.raises(UserError, match="rank 3 reads other data than rank 0"):
        refuse_another_run(build({}), [{**DATA[0], "bin_crc32": 8}], 3, 4, store)


def test_ranks_that_found_different_steps_of_a_moving_run_are_refused(store: dist.Store) -> None:
    refuse_another_run(build({}), (), 0, 1, store, {"step": 10, "crc32": 7})
    refuse_another_run(build({}), (), 1, 3, store, {"step": 10, "crc32": 7})
    with pytest.raises(UserError, match=r"rank 2 would start from a checkpoint of step 11, and rank 0 from a "
                                        r"checkpoint of step 10, .*; give --load a folder that no run writes"):
        refuse_another_run(build({}), (), 2, 3, store, {"step": 11, "crc32": 8})


@pytest.mark.parametrize("kind", ["engine", "hf"])
def test_what_a_run_starts_from_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    found = []
    for name, value in (("first", 1.0), ("copy", 1.0), ("other", 2.0)):
        folder = tmp_path / name
        if kind == "hf":
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            save_file({"x": torch.full((4,), value)}, folder / "model.safetensors")
            found.append(Start(Resolved("hf", folder)).content())
        else:
            slices = (Slice("rank-00000.safetensors", "x[0:4]", (0,), (4,), int(value)),)
            manifest = Manifest(3, {}, {}, {}, {"model/x": LogicalTensor((4,), "fp32", slices)})
            found.append(Start(checkpoint=Checkpoint(folder, manifest, {})).content())
    assert found[0] == found[1] != found[2]
    assert Start().content() == {}


@pytest.mark.slow
def test_two_ranks_of_different_runs_end_in_one_line(tmp_path: Path) -> None:
    data = runs.write_corpus(tmp_path / "corpus")
    port = str(runs.free_port())
    log = tmp_path / "log"
    flags = [*runs.MODEL, "--steps", "3", *data, "--out", str(tmp_path / "out"), "--seed"]
    ranks = [runs.Forked(["-m", "engine.pretrain", *flags, str(rank)], cwd=runs.ROOT, out=log, err=log,
                         env=runs.environment(**runs.by_hand(rank, 2, port))) for rank in range(2)]
    assert [rank.wait(200) for rank in ranks] == [runs.BAD_INPUT] * 2, log.read_text()
    assert log.read_text().count("rank 1 was started with --seed 1, and rank 0 with --seed 0") == 1
    assert not (tmp_path / "out").exists()
