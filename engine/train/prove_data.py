"""--verify-data on the ranks of a run: one rank of each machine reads the corpora through, all learn what it finds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from engine.comm.comm import Comm
from engine.data.proof import Proof
from engine.errors import LONGEST, UserError

SLICE_SECONDS = 1.0
"""Ranks meet this often: those that wait are never in a collective for long, whatever the corpora's size."""
_SAY_SECONDS = 5.0
_TEXT_BYTES = 2 * LONGEST


def prove_data(specs: Sequence[str], *, reads: bool, world: Comm | None, device: torch.device,
               say: Callable[[str], None]) -> None:
    """Compares the corpora of `specs` with their checksums. `reads`: whether this rank does so for its machine; all
    ranks of `world` (None where a process is alone) call this together. `say` hears how far it is, and of corpora
    that nothing proves.

    Raises UserError, the same on every rank, where a machine sees other bytes than were written."""
    proof, fault = _open(specs)
    for line in proof.unproven:
        say(f"--verify-data: {line}")
    blocks = proof.blocks() if reads else iter(())
    begun = said = time.monotonic()
    done, busy = 0, True
    while busy:
        if fault is None:
            count, fault = _slice(blocks)
            done += count
        busy = _agree(reads and done < proof.total, fault, world, device)
        if busy and time.monotonic() - said >= _SAY_SECONDS and proof.total:
            said = time.monotonic()
            say(f"--verify-data: {done / proof.total:.0%} of {proof.total / 1e6:,.1f} MB, "
                f"{done / 1e6 / (said - begun):,.0f} MB/s")
    if proof.total:
        say(f"--verify-data: {proof.total / 1e6:,.1f} MB match their checksums ({time.monotonic() - begun:.1f} s)")


def _open(specs: Sequence[str]) -> tuple[Proof, str | None]:
    """The proof, or an empty one and what is wrong: ranks of other machines wait to hear of it."""
    try:
        return Proof(specs), None
    except UserError as error:
        return Proof(()), str(error)


def _slice(blocks: Iterator[int]) -> tuple[int, str | None]:
    """Reads for a while: bytes read, and what is wrong with them."""
    until, count = time.monotonic() + SLICE_SECONDS, 0
    try:
        for size in blocks:
            count += size
            if time.monotonic() >= until:
                break
    except UserError as error:
        return count, str(error)
    return count, None


def _agree(busy: bool, fault: str | None, world: Comm | None, device: torch.device) -> bool:
    """Whether any rank is still reading. Raises UserError with the fault of the highest rank that found one."""
    if world is None:
        if fault is not None:
            raise UserError(fault)
        return busy
    rank = world.ranks[world.rank]
    state = torch.tensor([int(busy), 0 if fault is None else rank + 1], device=device)
    world.all_reduce_(state, "max")
    still, finder = state.tolist()
    if finder:
        raise UserError(_text_of(f"{fault} (rank {rank} on {platform.node()})" if finder == rank + 1 else "", world,
                                 device))
    return bool(still)


def _text_of(text: str, world: Comm, device: torch.device) -> str:
    """The text of the one rank that gives any, to all: the exit of a rank that could not say it would hide it."""
    raw = text.encode("utf-8")[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    letters = torch.tensor(list(raw), dtype=torch.int64, device=device)
    world.all_reduce_(letters)
    return bytes(letters.tolist()).rstrip(b"\0").decode("utf-8", "replace")
