"""Runs a pipeline schedule on paper: proves it free of deadlock and reads off its time, bubble and memory.

The model: a rank runs its actions strictly in order; F(stage, micro) needs F(stage - 1, micro) to have arrived;
B(stage, micro) needs its own F(stage, micro) and the arrival of B(stage + 1, micro). Sends never block the sender.
Since each rank's order is fixed, starts and ends are longest paths in one graph: no event queue is needed, and whether
a schedule deadlocks does not depend on the times.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from engine.parallel.schedule import Action, Kind, Schedule, place_of, stage_of

_MAX_COLUMNS = 320
"""A drawing wider than this gives up its labels."""

_SHOWN = 8
"""How many wrong actions of a rank `check` names before it only counts them."""


class Deadlock(RuntimeError):
    """No rank can go on. `stuck` maps each stuck rank to (the action it is at, the rank and action it waits for)."""

    def __init__(self, stuck: Mapping[int, tuple[Action, int, Action]], schedule: Schedule) -> None:
        self.stuck = MappingProxyType(dict(stuck))
        super().__init__("deadlock: " + "; ".join(_describe(rank, *stuck[rank], schedule) for rank in sorted(stuck)))


class Span(NamedTuple):
    """When an action ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every rank did when. Times are in the unit of the times given to `simulate`."""

    spans: tuple[tuple[Span, ...], ...]
    """For each rank, its actions in order, with start and end."""

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max((span.end for rank in self.spans for span in rank), default=0.0)

    @property
    def bubble(self) -> float:
        """Idle part of all ranks' time from 0 to the makespan, between 0 and 1."""
        busy = sum(span.end - span.start for rank in self.spans for span in rank)
        total = self.makespan * len(self.spans)
        return 1.0 - busy / total if total else 0.0

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the most forwards at one time whose backward has not ended.

        One is what a single chunk keeps for one micro-batch. Without backwards nothing is ever freed here; evaluation
        keeps no activations, so the number says nothing about it.
        """
        return tuple(_peak(rank) for rank in self.spans)

    def __str__(self) -> str:
        """A Gantt chart, one line per rank (dots are idle time), and a line with the three figures."""
        scale = _columns_per_unit(self)
        columns = round(self.makespan * scale)
        lines = [f"rank {rank:<3d}{_draw(spans, scale, columns)}".rstrip() for rank, spans in enumerate(self.spans)]
        peaks = " ".join(map(str, self.peak_activations))
        lines.append(f"makespan {self.makespan:g}, bubble {self.bubble:.1%}, peak activations {peaks}")
        return "\n".join(lines)


def simulate(
    schedule: Schedule,
    forward_time: float | Sequence[float] = 1.0,
    backward_time: float | Sequence[float] = 2.0,
    send_time: float = 0.0,
) -> Timeline:
    """Executes every rank's list in order and returns when each action ran.

    Args:
        schedule: for each rank its actions; the number of chunks is read from them.
        forward_time: time of a forward of one global stage (a chunk, not a rank); a sequence gives each stage its own.
        backward_time: the same for a backward.
        send_time: from the end of an action to the arrival of its result on another rank.

    Raises:
        Deadlock: the schedule cannot finish; it names for each stuck rank the action it waits for.
        ValueError: a sequence of times that has not one entry for each global stage.
    """
    virtual = 1 + max((action.chunk for rank in schedule for action in rank), default=0)
    last = len(schedule) * virtual - 1
    times = {Kind.F: _per_stage(forward_time, last + 1), Kind.B: _per_stage(backward_time, last + 1)}
    return _Simulation(schedule, last, times, send_time).finish()


def check(schedule: Schedule, stages: int, virtual: int, microbatches: int, *, forward_only: bool = False) -> None:
    """Checks that every (stage, micro-batch) has exactly one F and one B (F only if `forward_only`), on the right rank.

    Raises:
        ValueError: names the rank and its missing, repeated and foreign actions.
    """
    if len(schedule) != stages:
        raise ValueError(f"schedule has {len(schedule)} ranks, the pipeline has {stages}")
    kinds = (Kind.F,) if forward_only else (Kind.F, Kind.B)
    expected = Counter(
        Action(kind, micro, chunk) for kind in kinds for micro in range(microbatches) for chunk in range(virtual)
    )
    for rank, actions in enumerate(schedule):
        found = Counter(actions)
        missing, extra = expected - found, found - expected
        if missing or extra:
            wrong = f"missing {_listed(missing)}; repeated or foreign {_listed(extra)}"
            raise ValueError(f"schedule of rank {rank}: {wrong}")


def needs(action: Action, rank: int, stages: int, last: int) -> list[tuple[int, Action]]:
    """The (rank, action) pairs that must have ended, and arrived, before `rank` can start `action`.

    `last` is the number of the last global stage, stages * virtual - 1.
    """
    stage = stage_of(rank, action.chunk, stages)
    if action.kind is Kind.F:
        return [_at(Kind.F, action.micro, stage - 1, stages)] if stage > 0 else []
    own_forward = (rank, Action(Kind.F, action.micro, action.chunk))
    return [own_forward] + ([_at(Kind.B, action.micro, stage + 1, stages)] if stage < last else [])


@dataclass
class _Simulation:
    """One simulation under way: `ended` holds the end of every action done so far."""

    schedule: Schedule
    last: int
    times: Mapping[Kind, Sequence[float]]
    send_time: float
    ended: dict[tuple[int, Action], float] = field(default_factory=dict)

    def finish(self) -> Timeline:
        """Lets every rank go as far as it can, waking it when what it waits for is done, until all are through."""
        spans: list[list[Span]] = [[] for _ in self.schedule]
        waiting: defaultdict[tuple[int, Action], list[int]] = defaultdict(list)
        runnable = deque(range(len(self.schedule)))
        while runnable:
            rank = runnable.popleft()
            actions, done = self.schedule[rank], spans[rank]
            while len(done) < len(actions):
                action = actions[len(done)]
                wanted = needs(action, rank, len(self.schedule), self.last)
                missing = [need for need in wanted if need not in self.ended]
                if missing:
                    waiting[missing[0]].append(rank)
                    break
                done.append(self._run(rank, action, wanted, free=done[-1].end if done else 0.0))
                runnable.extend(waiting.pop((rank, action), ()))
        if waiting:
            at = {rank: self.schedule[rank][len(spans[rank])] for ranks in waiting.values() for rank in ranks}
            stuck = {rank: (at[rank], *missing) for missing, ranks in waiting.items() for rank in ranks}
            raise Deadlock(stuck, self.schedule)
        return Timeline(tuple(tuple(rank) for rank in spans))

    def _run(self, rank: int, action: Action, wanted: list[tuple[int, Action]], free: float) -> Span:
        """Runs an action whose needs have all ended, on a rank that is free from `free` on, and notes its end."""
        start = free
        for need in wanted:
            start = max(start, self.ended[need] + (self.send_time if need[0] != rank else 0.0))
        end = start + self.times[action.kind][stage_of(rank, action.chunk, len(self.schedule))]
        self.ended[rank, action] = end
        return Span(action, start, end)


def _at(kind: Kind, micro: int, stage: int, stages: int) -> tuple[int, Action]:
    """The rank that holds a global stage, and the action there."""
    rank, chunk = place_of(stage, stages)
    return rank, Action(kind, micro, chunk)


def _per_stage(times: float | Sequence[float], count: int) -> Sequence[float]:
    """One time for each global stage."""
    if isinstance(times, (int, float)):
        return [times] * count
    if len(times) != count:
        raise ValueError(f"{len(times)} times given for {count} global stages")
    return times


def _peak(spans: Sequence[Span]) -> int:
    """Most forwards of one rank without their backward; a rank does one thing at a time, so order is enough."""
    live = peak = 0
    for span in spans:
        live += 1 if span.action.kind is Kind.F else -1
        peak = max(peak, live)
    return peak


def _columns_per_unit(timeline: Timeline) -> float:
    """Characters per unit of time: the shortest action shows its label and a space, unless that gets too wide."""
    spans = [span for rank in timeline.spans for span in rank if span.end > span.start]
    if not spans:
        return 0.0
    label = 1 + max(len(str(span.action)) for span in spans)
    shortest = min(span.end - span.start for span in spans)
    return min(label / shortest, _MAX_COLUMNS / timeline.makespan)


def _draw(spans: Sequence[Span], scale: float, columns: int) -> str:
    """One rank's line: `F0 B0--- ` and dots where it is idle."""
    line = ["."] * columns
    for span in spans:
        first, end = round(span.start * scale), round(span.end * scale)
        line[first:end] = _box(str(span.action), end - first)
    return "".join(line)


def _box(label: str, width: int) -> str:
    """The label stretched to a width; too narrow for it, the letter of its kind."""
    return label.ljust(width - 1, "-") + " " if width > len(label) else label[0] * width


def _describe(rank: int, at: Action, source: int, needed: Action, schedule: Schedule) -> str:
    """One stuck rank, in words."""
    never = "" if needed in schedule[source] else f", which rank {source} never runs"
    return f"rank {rank} at {at} waits for {needed} of rank {source}{never}"


def _listed(actions: Counter[Action]) -> str:
    """The first few actions by name, and how many more."""
    names = [str(action) for action in actions.elements()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (" ".join(names[:_SHOWN]) or "none") + more
