"""Batches read ahead are the batches; the reader is ahead, by no more than it may, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import open_samples
from engine.data.batches import Batch, PretrainBatches
from engine.data.indexed import IndexedWriter
from engine.data.prefetch import Prefetch

PATIENCE = 30.0


def batch(step: int) -> Batch:
    return Batch(np.full((1, 2), step), np.full((1, 2), step + 1))


class Storage:
    """Batches whose reads are seen, and can be held up or made to fail."""

    def __init__(self, seconds: float = 0.0, fault: Callable[[int], None] = lambda step: None) -> None:
        self.seconds, self.fault = seconds, fault
        self.begun: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.changed = threading.Condition()
        self.held: set[int] = set()

    def step(self, step: int) -> Batch:
        with self.changed:
            self.begun.append(step)
            self.threads.add(threading.current_thread())
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: step not in self.held, PATIENCE)
        time.sleep(self.seconds)
        self.fault(step)
        return batch(step)

    def wait_for(self, step: int) -> None:
        """Returns once the reading of a step has begun."""
        with self.changed:
            assert self.changed.wait_for(lambda: step in self.begun, PATIENCE), self.begun

    def release(self) -> None:
        with self.changed:
            self.held.clear()
            self.changed.notify_all()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_a_corpus_read_ahead_is_the_corpus(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", 60000) as writer:
        writer.add_documents(np.arange(500), np.full(50, 10))
        writer.finish()
    batches = PretrainBatches(open_samples(str(tmp_path / "c"), seq_len=16, seed=0), 8, documents=True)
    again = PretrainBatches(open_samples(str(tmp_path / "c"), seq_len=16, seed=0), 8, documents=True)
    with Prefetch(batches, 3, 20) as ahead:
        for step in range(3, 20):
            found, wanted = ahead.step(step), again.step(step)
            np.testing.assert_array_equal(found.tokens, wanted.tokens)
            np.testing.assert_array_equal(found.labels, wanted.labels)
            np.testing.assert_array_equal(found.begins, wanted.begins)


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.integers(0, 9), max_size=20), ahead=st.integers(1, 4))
def test_any_order_of_steps_gives_each_its_own(steps: list[int], ahead: int) -> None:
    with Prefetch(Storage(), 0, 10, ahead) as batches:
        assert [int(batches.step(step).tokens[0, 0]) for step in steps] == steps


def test_while_a_step_trains_the_next_ones_are_read() -> None:
    """Slow storage: the reads of the next steps have begun before they are asked for, each step only once."""
    storage = Storage(seconds=0.005)
    with Prefetch(storage, 0, 8) as batches:
        for step in range(8):
            assert int(batches.step(step).tokens[0, 0]) == step
            storage.wait_for(min(step + 2, 7))  # the training of this step
    assert storage.begun == list(range(8))
    assert [thread.daemon for thread in storage.threads] == [True]
    assert threading.current_thread() not in storage.threads


def test_what_has_been_read_is_not_waited_for() -> None:
    storage = Storage()
    storage.held = {2}
    with Prefetch(storage, 0, 8) as batches:
        storage.wait_for(1)
        batches.step(0)
        storage.wait_for(2)  # held: it cannot be finished, and the step before it does not need it
        assert int(batches.step(1).tokens[0, 0]) == 1
        storage.release()
        assert int(batches.step(2).tokens[0, 0]) == 2


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_no_more_is_read_than_asked_for_and_nothing_past_the_end(ahead: int) -> None:
    storage = Storage()
    with Prefetch(storage, 5, 10, ahead) as batches:
        storage.wait_for(4 + ahead)
        batches.step(5)
        storage.wait_for(5 + ahead)
        time.sleep(0.05)  # time to go too far
        assert storage.begun == list(range(5, 6 + ahead))
        for step in range(6, 10):
            batches.step(step)
        time.sleep(0.05)
    assert storage.begun == [5, 6, 7, 8, 9]
    with Prefetch(Storage(), 5, 5) as none, pytest.raises(ValueError, match="step 5 is not below 5"):
        none.step(5)


def test_a_fault_comes_out_at_its_step_with_the_place_where_it_arose() -> None:
    def the_disk_fails(step: int) -> None:
        if step == 2:
            raise OSError("the disk has gone")

    storage = Storage(fault=the_disk_fails)
    with Prefetch(storage, 0, 9) as batches:
        batches.step(0)
        storage.wait_for(2)  # it has failed already, or is about to
        assert int(batches.step(1).tokens[0, 0]) == 1
        with pytest.raises(OSError, match="the disk has gone") as caught:
            batches.step(2)
        assert "the_disk_fails" in "".join(traceback.format_tb(caught.value.__traceback__))
        storage.fault = lambda step: None
        assert int(batches.step(2).tokens[0, 0]) == 2, "asked again, it is read again"
        assert int(batches.step(3).tokens[0, 0]) == 3


def test_an_exit_in_the_thread_ends_no_one_in_silence() -> None:
    def leaves(step: int) -> None:
        raise SystemExit(3)

    with Prefetch(Storage(fault=leaves), 0, 9) as batches, pytest.raises(SystemExit):
        batches.step(0)


def test_closing_waits_for_the_read_under_way_and_no_other() -> None:
    storage = Storage(seconds=0.05)
    batches = Prefetch(storage, 0, 100)
    storage.wait_for(0)
    batches.close()
    assert storage.begun == [0]
    with pytest.raises(ValueError, match="closed"):
        batches.step(0)
    batches.close()


def test_a_disk_that_hangs_does_not_hang_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.prefetch._PATIENCE", 0.05)
    storage = Storage()
    storage.held = {0}
    batches = Prefetch(storage, 0, 9)
    storage.wait_for(0)
    batches.close()
    storage.release()
    for thread in storage.threads:
        thread.join(PATIENCE)
