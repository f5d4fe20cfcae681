"""Pipeline schedules as data: who computes what, in which order.

A schedule is a pure function `(stages, virtual, microbatches) -> one list of actions per rank`. It knows nothing of
tensors, time or communication: `simulator.py` proves it free of deadlock and reads off its bubble and its memory, and
one executor runs any of them. Each rank of the pipeline holds `virtual` chunks of layers; chunk c of rank r is the
global stage c * stages + r, so a micro-batch goes round the ranks once for each chunk.

Sources: PipeDream-Flush, also called 1F1B (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML
2021, arXiv:2006.09503) and its interleaved form (Narayanan et al., "Efficient Large-Scale Language Model Training on
GPU Clusters Using Megatron-LM", SC 2021, arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from types import MappingProxyType

from engine.errors import UserError, nearest


class Kind(StrEnum):
    """What an action computes. A zero-bubble schedule would split B and add W, the gradient of the weights."""

    F = "F"
    """Forward: input activation to output activation."""
    B = "B"
    """Backward: gradient of the output to gradient of the input, and the gradients of the weights."""


@dataclass(frozen=True)
class Action:
    """One unit of a rank's work: `kind` for micro-batch `micro` through the rank's chunk `chunk`."""

    kind: Kind
    micro: int
    chunk: int = 0

    def __str__(self) -> str:
        """Compact: `F3`, `B0`; chunks after the first are named, `F3.1`."""
        return f"{self.kind}{self.micro}" + (f".{self.chunk}" if self.chunk else "")


Schedule = list[list[Action]]
"""For each rank of the pipeline, its actions in the order in which it runs them."""

ScheduleFunction = Callable[[int, int, int], Schedule]
"""(stages, virtual, microbatches) -> Schedule."""


def stage_of(rank: int, chunk: int, stages: int) -> int:
    """Global stage number of a rank's chunk; stage 0 holds the embedding, the last stage the head."""
    return chunk * stages + rank


def place_of(stage: int, stages: int) -> tuple[int, int]:
    """(rank, chunk) that holds a global stage: the inverse of `stage_of`."""
    return stage % stages, stage // stages


def one_f_one_b(stages: int, virtual: int, microbatches: int) -> Schedule:
    """1F1B (PipeDream-Flush): rank i never holds more than min(microbatches, stages - i) activations.

    The bubble is (stages - 1) / (microbatches + stages - 1) of the makespan when all stages take equally long. Fewer
    micro-batches than stages are fine: the steady phase of the early ranks is then empty.

    Raises:
        UserError: a number below 1, or virtual other than 1.
    """
    _check_counts(stages, virtual, microbatches)
    if virtual != 1:
        raise UserError(
            f"schedule 1f1b runs one chunk of layers per rank, not {virtual}; "
            "use --virtual-stages 1, or --schedule interleaved"
        )
    forwards = [Action(Kind.F, micro) for micro in range(microbatches)]
    backwards = [Action(Kind.B, micro) for micro in range(microbatches)]
    return [_phases(forwards, backwards, warm_up=stages - 1 - rank) for rank in range(stages)]


def interleaved(stages: int, virtual: int, microbatches: int) -> Schedule:
    """Interleaved 1F1B: `virtual` chunks per rank make the bubble `virtual` times smaller for more communication.

    Micro-batches go in groups of `stages`; a rank takes a group through chunk 0, then the same group through chunk 1,
    and so on, backward from the last chunk to the first. The bubble is (stages - 1) / (virtual * microbatches) of the
    ideal time when microbatches divide by stages (arXiv:2104.04473, section 2.2.2).

    When they do not, the last group is filled up with micro-batches that are struck out again afterwards. That cannot
    deadlock: every action depends only on actions of its own micro-batch, and striking others out leaves the order of
    the rest as it was. Nor can it need more memory than the filled schedule.

    Raises:
        UserError: a number below 1, or virtual 1, which leaves nothing to interleave.
    """
    _check_counts(stages, virtual, microbatches)
    if virtual == 1:
        raise UserError(
            "schedule interleaved needs two or more chunks of layers per rank, not 1; "
            "use --virtual-stages 2, or --schedule 1f1b"
        )
    filled = -(-microbatches // stages) * stages
    forwards = _grouped(Kind.F, stages, range(virtual), filled)
    backwards = _grouped(Kind.B, stages, range(virtual)[::-1], filled)
    # A rank gets its first gradient after it has taken the first group through all chunks but the last, and micro-batch
    # 0 has then gone on to the last rank and its gradient has come back: one more forward for each hop, there and back.
    warm_ups = [(virtual - 1) * stages + 2 * (stages - 1 - rank) for rank in range(stages)]
    return [_strike(_phases(forwards, backwards, warm_up), microbatches) for warm_up in warm_ups]


def forward_only(stages: int, virtual: int, microbatches: int) -> Schedule:
    """Evaluation: every forward and no backward, in the order in which the training schedules run their forwards.

    Raises:
        UserError: a number below 1.
    """
    _check_counts(stages, virtual, microbatches)
    forwards = _grouped(Kind.F, stages, range(virtual), microbatches)
    return [list(forwards) for _ in range(stages)]


SCHEDULES: Mapping[str, ScheduleFunction] = MappingProxyType({"1f1b": one_f_one_b, "interleaved": interleaved})
"""The training schedules, by the name that `--schedule` takes. Evaluation calls `forward_only` itself."""


def build_schedule(name: str, stages: int, virtual: int, microbatches: int) -> Schedule:
    """The schedule `name` for a pipeline of `stages` ranks with `virtual` chunks each.

    Raises:
        UserError: an unknown name, or numbers that the schedule cannot run.
    """
    if name not in SCHEDULES:
        guess = nearest(name, SCHEDULES)
        hint = f"did you mean {guess}? " if guess else ""
        raise UserError(f"unknown schedule {name!r}; {hint}use --schedule {' or '.join(SCHEDULES)}")
    return SCHEDULES[name](stages, virtual, microbatches)


def _phases(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """One rank's order: `warm_up` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return [
        *forwards[:warm_up],  # warm-up: fill the pipeline
        *chain.from_iterable(pairs),  # steady: each backward frees what the next forward needs
        *backwards[steady:],  # cool-down: drain the pipeline
    ]


def _grouped(kind: Kind, group: int, chunks: range, microbatches: int) -> list[Action]:
    """All actions of a kind: micro-batches in groups (the last may be smaller), each group chunk after chunk."""
    return [
        Action(kind, micro, chunk)
        for first in range(0, microbatches, group)
        for chunk in chunks
        for micro in range(first, min(first + group, microbatches))
    ]


def _strike(actions: list[Action], microbatches: int) -> list[Action]:
    """The actions without those of micro-batches that do not exist."""
    return [action for action in actions if action.micro < microbatches]


def _check_counts(stages: int, virtual: int, microbatches: int) -> None:
    """Raises UserError unless all three are at least 1."""
    counts = {"pipeline stages": stages, "virtual stages": virtual, "micro-batches": microbatches}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be 1 or more, not {count}")
