"""No schedule depends on how two ranks connect: replayed with connections that are made at a channel's first message
and block until both sides have come, as NCCL's are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engine.comm.heart import Heart
from engine.config import Layout
from engine.mesh import Mesh, neighbours, one_by_one, open_channels, place
from engine.parallel.executor import Executor, _Run, make_chunks
from engine.parallel.micro_batch import MicroBatch

Call = tuple[str, int, int]
"""(what, channel, number): `send` and `recv` begin the n-th message of a channel, `sent` and `got` wait for its end."""


@dataclass
class Recorder:
    """Stands for torch.distributed on one rank, and writes down what it is asked for."""

    calls: list[Call] = field(default_factory=list)
    groups: int = 0
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def new_group(self, ranks: list[int], timeout: timedelta) -> int:
        self.groups += 1
        return self.groups

    def begin(self, what: str, group: int) -> SimpleNamespace:
        number = self.counts[what, group]
        self.counts[what, group] += 1
        self.calls.append((what, group, number))
        end = "sent" if what == "send" else "got"
        return SimpleNamespace(wait=lambda: self.calls.append((end, group, number)))

    def install(self, patch: pytest.MonkeyPatch, rank: int) -> None:
        patch.setattr(dist, "get_rank", lambda: rank)
        patch.setattr(dist, "new_group", self.new_group)
        patch.setattr(dist, "get_backend", lambda group: "gloo")
        patch.setattr(dist, "isend", lambda x, dst, group: self.begin("send", group))
        patch.setattr(dist, "irecv", lambda x, src, group: self.begin("recv", group))
        patch.setattr(dist, "send", lambda x, dst, group: self.begin("send", group).wait())
        patch.setattr(dist, "recv", lambda x, src, group: self.begin("recv", group).wait())


class Toy:
    """A stage that computes nothing."""

    def __init__(self, last: bool) -> None:
        self.last = last

    def __call__(self, x: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        return x.detach().requires_grad_() * 1 if not x.requires_grad else x * 1

    def loss(self, x: torch.Tensor, labels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return x, torch.ones_like(x)

    def losses(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x

    def boundary(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch)


def record(pp: int, virtual: int, micros: int, *, training: bool) -> Iterator[tuple[list[Call], list[Call]]]:
    """What each rank's mesh asks of its channels when it makes them, and then its executor in a step."""
    layout = Layout(pp=pp)
    for rank in range(pp):
        recorder = Recorder()
        with pytest.MonkeyPatch.context() as patch:
            recorder.install(patch, rank)
            channels = open_channels(neighbours(layout), rank, timedelta(seconds=1), Heart(), one_by_one)
            made = list(recorder.calls)
            recorder.calls.clear()
            mesh = Mesh(layout, rank, place(layout, rank), {}, channels)  # type: ignore[arg-type]
            chunks = make_chunks(mesh, virtual, lambda stage: (Toy(stage == pp * virtual - 1), None))
            executor = Executor(chunks, mesh, "1f1b" if virtual == 1 else "interleaved")
            batches = [MicroBatch(part, part, part) for part in torch.zeros(micros).split(1)]
            with torch.set_grad_enabled(training):
                schedule = executor.schedule if training else executor.forward_schedule
                _Run(executor, batches, 1).execute(schedule(micros))
        yield made, list(recorder.calls)


def replay(ranks: list[list[Call]]) -> list[str]:
    """Lets every rank go as far as it can; the ranks that are stuck, and where. A rank's first call on a channel
    returns when the other side has made its first call there; the end of a message is there when both have begun it."""
    position = [0] * len(ranks)
    begun: set[tuple[str, int, int]] = set()
    touched: Counter[int] = Counter()  # channel -> sides that have come
    here: set[tuple[int, int]] = set()  # (rank, channel)
    moved = True
    while moved:
        moved = False
        for rank, calls in enumerate(ranks):
            while position[rank] < len(calls):
                what, channel, number = calls[position[rank]]
                if (rank, channel) not in here:
                    here.add((rank, channel))
                    touched[channel] += 1
                    moved = True
                if touched[channel] < 2:
                    break
                if what in ("send", "recv"):
                    begun.add((what, channel, number))
                elif ("recv" if what == "sent" else "send", channel, number) not in begun:
                    break
                position[rank] += 1
                moved = True
    return [f"rank {rank} at {calls[done]}" for rank, (calls, done) in enumerate(zip(ranks, position, strict=True))
            if done < len(calls)]


@pytest.mark.parametrize("pp", [
    pytest.param(pp, marks=pytest.mark.slow if pp in (2, 5) else pytest.mark.soak) for pp in range(2, 9)])
def test_no_schedule_depends_on_how_ranks_connect(pp: int) -> None:
    for virtual in range(1, 5):
        for micros in range(1, 17):
            for training in (True, False):
                found = list(record(pp, virtual, micros, training=training))
                stuck = replay([made + step for made, step in found])
                assert not stuck, (pp, virtual, micros, training, stuck)


def test_without_a_message_when_a_channel_is_made_a_step_of_one_micro_batch_hangs() -> None:
    """The replay finds what it is for: the first step would stand still."""
    for pp in (2, 4):
        assert replay([step for _, step in record(pp, 1, 1, training=True)])
    assert all(made for made, _ in record(2, 1, 1, training=True)), "every channel carries a message when it is made"
