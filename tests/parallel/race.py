"""A group of ranks under which a race shows: what is read before its collective has ended is NaN, and what is written
before that is found out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.comm.comm import Comm, Pending


class RaceComm(Comm):
    """Another group, whose collectives work on copies. An output holds NaN (or the smallest integer) until `wait`, and
    at `wait` both it and the inputs must be as they were. `unwaited` counts the collectives that nobody waited for."""

    def __init__(self, inner: Comm) -> None:
        super().__init__(inner.ranks, inner.ranks[inner.rank])
        self.inner = inner
        self.via = inner.via
        self.unwaited = 0

    def start_all_reduce_(self, x: torch.Tensor, op: str = "sum") -> Pending:
        copy = x.clone()
        return self._raced(self.inner.start_all_reduce_(copy, op), x, copy, ())

    def start_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Pending:
        copy, given = torch.empty_like(out), flat.clone()
        return self._raced(self.inner.start_reduce_scatter(copy, given), out, copy, ((flat, flat.clone()),))

    def start_all_gather(self, out: torch.Tensor, flat: torch.Tensor) -> Pending:
        copy, given = torch.empty_like(out), flat.clone()
        return self._raced(self.inner.start_all_gather(copy, given), out, copy, ((flat, flat.clone()),))

    def _raced(self, work: Pending, out: torch.Tensor, copy: torch.Tensor,
               inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Pending:
        self.unwaited += 1
        out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)
        return _Raced(self, work, out, out.clone(), copy, inputs)


@dataclass
class _Raced:
    """A collective under way; `before` is what `out` was filled with."""

    comm: RaceComm
    work: Pending
    out: torch.Tensor
    before: torch.Tensor
    copy: torch.Tensor
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def wait(self) -> None:
        self.work.wait()
        assert _same_bits(self.out, self.before), "an output was written before its collective had ended"
        for given, then in self.inputs:
            assert _same_bits(given, then), "an input was changed before its collective had ended"
        self.out.copy_(self.copy)
        self.comm.unwaited -= 1


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
