"""Where ranks meet: whose store it is, and how the word that a run ends reaches those that have come."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine.train import rendezvous
from engine.train.place import Place
from engine.train.rendezvous import NoMeeting, be_aware, connect, end_run, linger

LONG = 60.0
PROGRAM = '''
"""engine.pretrain, where rank 1 crashes in its checks."""
import os, sys
from engine import pretrain
from engine.train.entry import enter
from engine.train.request import EntryPoint

def check_data(config):
    if os.environ["RANK"] == "1":
        raise RuntimeError("the file system has gone")
    return pretrain.check_data(config)

sys.exit(enter(EntryPoint("early", {}, check_data), sys.argv[1:], (), (), pretrain.make_feed))
'''


@pytest.fixture
def place() -> Place:
    return Place(0, 2, 0, 2, port=runs.free_port(), job="7")


@pytest.mark.parametrize(("change", "words"), [
    ({"world": 4}, "rank 0 of another run, of 2 ranks, and this one has 4; set another MASTER_PORT"),
    ({"job": "8"}, "rank 0 of another run, of job '7', and this one is '8'; set another MASTER_PORT"),
])
def test_another_runs_store_is_known_at_once(place: Place, change: dict[str, object], words: str) -> None:
    store = connect(place, LONG)
    began = time.monotonic()
    with pytest.raises(NoMeeting, match=words):
        connect(replace(place, rank=1, **change), LONG)  # type: ignore[arg-type]
    assert time.monotonic() - began < LONG / 2
    connect(replace(place, rank=1), LONG)
    assert store.add("seat/1", 0) == 1


def test_another_programs_store_is_no_runs() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LONG))
    with pytest.raises(NoMeeting, match="is no store of a run; is MASTER_PORT right"):
        connect(Place(1, 2, 0, 2, port=store.port), 1.0)


def seconds_of_linger(store: dist.Store, world: int) -> float:
    began = time.monotonic()
    linger(store, world, LONG)
    return time.monotonic() - began


def test_who_has_come_is_waited_for_until_it_knows_and_no_longer(place: Place) -> None:
    store, other = connect(place, LONG), connect(replace(place, rank=1), LONG)
    assert end_run(store, 0, 2, "error: no")
    threading.Timer(1.0, be_aware, (other, 1)).start()
    assert 0.9 < seconds_of_linger(store, 2) < LONG / 2


def test_who_has_not_come_is_waited_for_only_while_ranks_start(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = connect(place, LONG)
    end_run(store, 0, 2, "error: no")
    monkeypatch.setattr(rendezvous, "_age", lambda: 300.0)
    assert seconds_of_linger(store, 2) < LONG / 2
    monkeypatch.setattr(rendezvous, "_age", lambda: 0.0)
    waits = threading.Thread(target=linger, args=(store, 2), daemon=True)
    waits.start()
    waits.join(1.0)
    assert waits.is_alive(), "it may still be starting"
    be_aware(connect(replace(place, rank=1), LONG), 1)
    waits.join(LONG)
    assert not waits.is_alive()


def test_a_process_knows_its_age() -> None:
    first = rendezvous._age()
    time.sleep(0.2)
    assert 0.1 < rendezvous._age() - first < LONG


@pytest.mark.slow
def test_a_rank_that_crashes_before_the_meeting_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(PROGRAM)
    data = runs.write_corpus(tmp_path / "corpus")
    run = runs.start_ranks(tmp_path / "out", [*runs.MODEL, "--steps", "3", *data], world=2,
                           program=[str(tmp_path / "early.py")])
    try:
        assert runs.until(run.all_ended, 100), run.said()  # a third of --timeout
    finally:
        run.kill()
    assert run.codes() == [1, 1]
    cause = "rank 1 failed: RuntimeError: the file system has gone"
    assert f"\n{cause}\n" in run.said() and f"rank 0 of 2: {cause}; this rank ends without saving" in run.said()
    assert run.said().count("Traceback") == 1, "the crash itself is shown"
