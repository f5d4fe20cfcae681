"""A run that was stopped and resumed, twice and across an epoch's end, is the run that never stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import pretrain
from engine.data.batches import PretrainBatches
from engine.data.samples import open_samples

STEPS = ["--steps", "22", "--save-every", "6"]
EPOCH = 62  # samples: an epoch ends within step 16, and another offset begins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    return runs.write_corpus(folder / "corpus")


@pytest.mark.slow
def test_twice_resumed_across_an_epochs_end_is_bit_equal(folder: Path, data: list[str]) -> None:
    samples = open_samples(data[1], seq_len=32, seed=1234)
    assert samples.epoch_size == EPOCH and EPOCH % 4 and 7 * 4 < EPOCH < 17 * 4
    assert runs.pretrain(*runs.MODEL, *STEPS, *data, "--out", folder / "whole").returncode == 0
    first = runs.pretrain(*runs.MODEL, *STEPS, *data, "--out", folder / "parts", "--stop-after", "7")
    assert first.returncode == 0, first.stderr
    for stop in (["--stop-after", "17"], []):
        done = runs.pretrain("--out", folder / "parts", "--resume", *stop)  # the rest is in the checkpoint
        assert done.returncode == 0, done.stderr
    runs.assert_same_run(folder / "parts", folder / "whole")


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_resume(folder: Path, data: list[str]) -> None:
    out = folder / "finished"
    flags = [*runs.MODEL, "--steps", "2", *data, "--out", out]
    done = runs.pretrain(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    again = runs.pretrain(*flags, "--resume")
    assert again.returncode == 0 and "nothing to do: step 2 of 2 is done" in again.stdout
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


@pytest.mark.slow
def test_another_global_batch_goes_on_at_the_next_sample(folder: Path, data: list[str]) -> None:
    out = folder / "batch"
    assert runs.pretrain(*runs.MODEL, "--steps", "3", *data, "--out", out).returncode == 0
    done = runs.pretrain("--out", out, "--resume", "--global-batch", "8", "--steps", "5")
    assert done.returncode == 0, done.stderr
    lines = [runs.json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(line["first"], line["count"]) for line in lines] == [(0, 4), (4, 4), (8, 4), (12, 8), (20, 8)]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_data_ranks_of_a_step_read_its_samples_once(data: list[str], dp: int) -> None:
    samples = open_samples(data[1], seq_len=32, seed=1234)
    whole = PretrainBatches(samples, 8).step(9)
    parts = [PretrainBatches(samples, 8, rank, dp).step(9) for rank in range(dp)]
    assert (whole.tokens == runs.np.concatenate([part.tokens for part in parts])).all()
    assert (whole.labels == runs.np.concatenate([part.labels for part in parts])).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # for want of a file descriptor
def test_other_data_than_the_run_was_trained_on_must_be_meant(folder: Path, data: list[str],
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    out, other = folder / "other", runs.write_corpus(folder / "other-corpus", tokens=3000)

    def refused(*flags: str) -> str:
        assert pretrain.main(["--out", str(out), "--resume", *flags]) == runs.BAD_INPUT
        return capsys.readouterr().err

    assert runs.pretrain(*runs.MODEL, "--steps", "2", *data, "--out", out).returncode == 0
    said = refused("--steps", "4", *other)
    assert said.count("\n") == 1 and f"it was trained on {data[1]} with documents 40" in said
    assert f"{other[1]} has documents 60; give --data as it was, or --new-data" in said
    meant = runs.pretrain("--out", out, "--resume", "--steps", "4", *other, "--new-data")
    assert meant.returncode == 0, meant.stderr
    assert runs.pretrain("--out", out, "--resume", "--steps", "5").returncode == 0, "it is this run's data from now on"
    assert "--new-data" in refused("--steps", "6", *data), "said once, it holds once"


@pytest.mark.slow
def test_a_corpus_that_changes_under_a_run_stops_it(folder: Path) -> None:
    flags = runs.write_corpus(folder / "changing")
    run = runs.start_ranks(folder / "changed", [*runs.MODEL, "--steps", "100000", *flags], world=1)
    try:
        run.wait_for_step(2)
        with open(f"{flags[1]}.bin", "ab") as file:
            file.write(b"more")
        assert run.codes() == [runs.BAD_INPUT]
    finally:
        run.kill()
    assert f"error: {flags[1]}.bin has changed since it was opened: it had 4000 bytes and has 4004 now" in run.said()
