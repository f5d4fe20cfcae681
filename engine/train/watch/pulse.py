"""What ranks tell each other about their hearts, and what follows from two looks at all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.comm.heart import SLOW, Phase


@dataclass(frozen=True)
class Limits:
    """Seconds: `peers` that a rank may stand still, or wait for others, in a step; `disk` while it saves or opens
    weights and data, since a slow disk is no reason to end a run."""

    peers: float
    disk: float

    def of(self, phase: Phase) -> float:
        """The limit of a phase."""
        return self.disk if phase in SLOW else self.peers

    @property
    def last(self) -> float:
        """What a transport may wait by itself. The watch ends a run long before, and names the rank that is to blame; a
        transport that gives up first would end a healthy rank."""
        return 2 * max(self.peers, self.disk) + 600


@dataclass(frozen=True)
class Pulse:
    """A rank's heart as it was published. `count` goes up with every publication, `still` is the time in seconds since
    the last beat, by the rank's own clock."""

    count: int
    beats: int
    still: float
    waiting: bool
    step: int
    phase: Phase
    pid: int
    host: str

    def text(self) -> str:
        """As it stands in the store."""
        return (f"{self.count} {self.beats} {self.still:.1f} {self.waiting:d} {self.step} {self.phase} {self.pid} "
                f"{self.host}")

    @classmethod
    def parse(cls, text: str) -> Pulse | None:
        """The pulse of a text; None for the empty one of a rank that has not come yet."""
        if not text:
            return None
        count, beats, still, waiting, step, phase, pid, host = text.split(" ", 7)
        return cls(int(count), int(beats), float(still), waiting == "1", int(step), Phase(phase), int(pid), host)

    @property
    def doing(self) -> str:
        """What the rank is at: `data at step 5`, `a collective (forward) at step 5`."""
        what = f"a collective ({self.phase})" if self.waiting else str(self.phase)
        return f"{what} at step {self.step}" if self.step else what


NOBODY = -1
"""The rank that is to blame when the store is: no rank's stack says why."""
Table = Sequence[Pulse | None]
"""All ranks' pulses, by rank."""


@dataclass(frozen=True)
class Finding:
    """Why a run ends: the rank that is to blame (or NOBODY), in words, and the exit code of all."""

    rank: int
    text: str
    code: int = 1

    @property
    def in_order(self) -> bool:
        """Whether a rank has ended the run in order (`rendezvous.end_run`): a refusal, or a signal."""
        return self.code != 1 or self.text.startswith("error: ")

    def line(self) -> str:
        """As it stands in the store."""
        return f"{self.code} {self.rank} {self.text}"

    @classmethod
    def parse(cls, line: str) -> Finding | None:
        """The finding of a line; None for the empty one."""
        if not line:
            return None
        code, rank, text = line.split(" ", 2)
        return cls(int(rank), text, int(code))


def hanging(rank: int, pulse: Pulse) -> Finding:
    """A rank whose main thread stands still without waiting for anyone."""
    return Finding(rank, f"{who(rank, pulse)} hangs in {pulse.doing}: nothing has moved for {pulse.still:.0f} s")


def verdict(before: Table, after: Table, seconds: float) -> Finding | None:
    """Who keeps a rank waiting that has waited for `seconds`, from two looks at all hearts; None where somebody still
    works, or watches over itself and will say so."""
    missing = [rank for rank, pulse in enumerate(after) if pulse is None]
    if missing:
        return Finding(missing[0], f"{_ranks(missing, 'has', 'have')} not come to the meeting within {seconds:g} s")
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    if len(pairs) < len(after):
        return None
    frozen = [rank for rank, (b, a) in enumerate(pairs) if a.count == b.count]
    if frozen:
        first = pairs[frozen[0]][1]
        others = f", and so {_ranks(frozen[1:], 'does', 'do')}" if frozen[1:] else ""
        return Finding(frozen[0], f"{who(frozen[0], first)} does not respond (stopped, or its machine is gone)"
                       f"{others}; it was last seen in {first.doing}")
    if all(a.waiting and a.beats == b.beats for b, a in pairs):
        # A rank that has gone on to another step, or done more in this one, has been let go by the others.
        slowest = min(range(len(pairs)), key=lambda rank: (pairs[rank][1].step, pairs[rank][1].beats))
        pulse = pairs[slowest][1]
        return Finding(slowest, f"all ranks wait for each other, {who(slowest, pulse)} is furthest behind: in "
                       f"{pulse.doing}, for {pulse.still:.0f} s")
    return None


def who(rank: int, pulse: Pulse) -> str:
    """A rank and where its process is."""
    return f"rank {rank} (process {pulse.pid} on {pulse.host})"


def _ranks(ranks: Sequence[int], one: str, many: str) -> str:
    """`rank 3 has`, `ranks 1, 2 and 14 more have`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {shown}{more} {many}"


class Stillness:
    """How long something has not changed, counted in the observer's own looks: time in which the observer was stopped
    as well (a suspended job, a starved machine) does not count."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.seconds = 0.0
        self._seen: object = None
        self._when: float | None = None

    def look(self, value: object, now: float) -> float:
        """Takes a look at a time; returns the seconds for which the value has stood still."""
        passed = min(now - self._when, self.most) if self._when is not None else 0.0
        self._when = now
        self.seconds = self.seconds + passed if value == self._seen else 0.0
        self._seen = value
        return self.seconds


