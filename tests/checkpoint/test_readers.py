"""A checkpoint that somebody reads is not deleted under him by the run that writes the next ones."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import runs
from test_save_load import TINY, build, save

from engine import pretrain
from engine.checkpoint import open_checkpoint, resolve, step_folders
from engine.checkpoint.folders import TRIES, prune
from engine.checkpoint.load import Checkpoint
from engine.errors import UserError
from engine.hf import verify
from engine.train import run as running
from engine.train.lock import RunLock
from tools import convert_ckpt

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


def test_keep_spares_a_step_as_long_as_it_is_held(tmp_path: Path) -> None:
    root, [rank] = tmp_path / "checkpoints", build(TINY, (1, 1, 1))
    save(root, 1, [rank], keep=1)
    first, again = resolve(tmp_path), resolve(root / "step-00000001")
    save(root, 2, [rank], keep=1)
    first.release()
    save(root, 3, [rank], keep=1)
    assert list(step_folders(root)) == [1, 3], "held by one of the two that read it, and nobody read step 2"
    del again
    save(root, 4, [rank], keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004"]


def test_the_latest_step_of_a_run_that_goes_on_can_be_read(tmp_path: Path) -> None:
    root, [rank] = tmp_path / "checkpoints", build(TINY, (1, 1, 1))
    save(root, 1, [rank], keep=1)
    ended = threading.Event()

    def write() -> None:
        step = 1
        with RunLock(tmp_path):  # as a run has it: else readers tidy up after it
            while not ended.is_set():
                step += 1
                save(root, step, [rank], keep=1)

    writer = threading.Thread(target=write)
    writer.start()
    read = []
    try:
        for _ in range(20):
            found = resolve(tmp_path)
            checkpoint = open_checkpoint(found.folder)
            time.sleep(0.02)
            assert {path.name for path in checkpoint.assets.iterdir()} == {"config.json", "tokenizer.json"}
            read.append(checkpoint.step)
    finally:
        ended.set()
        writer.join()
    assert len(set(read)) > 5


def test_a_file_system_that_numbers_files_anew_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [rank] = build(TINY, (1, 1, 1))
    save(tmp_path / "checkpoints", 1, [rank])
    monkeypatch.setattr("os.path.samestat", lambda *given: False)
    assert resolve(tmp_path).folder.name == "step-00000001"


def test_a_pointer_to_nothing_is_still_an_error(tmp_path: Path) -> None:
    root, [rank] = tmp_path / "checkpoints", build(TINY, (1, 1, 1))
    save(root, 1, [rank])
    (root / "latest").write_text("step-00000009")
    with pytest.raises(UserError, match="'step-00000009', which is not a checkpoint there"):
        resolve(tmp_path)
    assert TRIES < 100, "each try looks through the folder"


def test_a_conversion_is_verified_against_the_step_that_it_read(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    data = runs.write_corpus(tmp_path / "corpus")
    flags = [*runs.MODEL, *data, "--steps", "4", "--save-every", "2", "--out", str(tmp_path / "run")]
    assert pretrain.main(flags) == 0
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    pointer.write_text("step-00000002\n")
    sound = Checkpoint.source

    def moved(self: Checkpoint, kind: str = "model") -> object:
        pointer.write_text("step-00000004\n")  # the run goes on, and leaves the older step to nobody
        prune(pointer.parent, 1, pointer.parent / "step-00000004")
        return sound(self, kind)

    monkeypatch.setattr(Checkpoint, "source", moved)
    monkeypatch.setattr(verify, "_compare_logits", lambda *given: True)
    argv = ["--load", str(tmp_path / "run"), "--save", str(tmp_path / "copy"), "--to", "engine", "--verify"]
    assert convert_ckpt.main(argv) == 0


def test_a_run_that_has_read_its_weights_holds_them_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = runs.write_corpus(tmp_path / "corpus")
    flags = [*runs.MODEL, *data, "--steps", "2", "--save-every", "1"]
    assert pretrain.main([*flags, "--out", str(tmp_path / "first")]) == 0
    root = tmp_path / "first" / "checkpoints"
    sound, left = running.train, []

    def train(*given: object) -> bool:
        prune(root, 1, root / "step-00000002")
        left.extend(step_folders(root))
        return sound(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "train", train)
    assert pretrain.main([*flags, "--load", str(root / "step-00000001"), "--out", str(tmp_path / "second")]) == 0
    assert left == [2]
