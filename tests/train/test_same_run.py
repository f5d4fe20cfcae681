"""Ranks that were started for different runs never train together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine.config.flags import build
from engine.errors import UserError
from engine.train.same_run import refuse_another_run

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
