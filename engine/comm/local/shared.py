"""Collectives through shared memory, for ranks on one Linux machine without GPUs: a copy costs a tenth of gloo's TCP.

The ranks of a machine share memory and have a socket between each two of them (`meeting.py`). In the memory every group
has two buffers a rank. A rank copies a chunk into its buffer, sends each peer one byte, waits for theirs, and reduces
from all buffers in rank order: the bits are the same on all ranks and in every run. A byte sent and received orders the
memory accesses around it, a closed socket is a dead peer, and a rank that waits sleeps.

Why two buffers are enough: a peer's byte for chunk k says that it has read all of chunk k - 1, whose buffer chunk k + 1
overwrites.
"""

from __future__ import annotations

import secrets
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from weakref import WeakSet

import torch
import torch.distributed as dist

from engine.comm.comm import Comm, all_gather_flat
from engine.comm.heart import Heart
from engine.comm.local import meeting

CHUNK = 1 << 21
"""Bytes that a rank passes at once: the larger, the fewer waits, as long as a core's cache holds it."""
SMALL = 1 << 14
"""Below this many bytes more than two ranks reduce all of a message each: half the waiting."""
SPINS = 20
"""Looks at the sockets before a rank goes to sleep, each about a microsecond: waking up costs more."""
HALF = (torch.bfloat16, torch.float16)
OPS: Mapping[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum}
Steps = Iterator[None]
"""A collective cut at its waits: at each `yield` this rank's data is in its buffer, after it all peers' data is."""


class PeerLost(dist.DistError):  # type: ignore[misc]
    """A rank has died, or did not come to a collective within the timeout."""


class Operation:
    """A collective under way."""

    def __init__(self, comm: SharedComm, steps: Steps) -> None:
        self.comm, self.steps = comm, steps
        self.done = False

    def wait(self) -> None:
        """Returns when the result is there. Raises PeerLost."""
        self.comm.host.complete(self)


class Host:
    """This process among the ranks of its machine: a socket to each of them and the groups it is in."""

    def __init__(self, sockets: Mapping[int, socket.socket], channels: int, timeout: float, heart: Heart) -> None:
        self.sockets = sockets
        self.timeout = timeout
        self.heart = heart
        self.arrived = {peer: [0] * channels for peer in sockets}
        self.gone: set[int] = set()
        self.comms: WeakSet[SharedComm] = WeakSet()
        self.peers = {link.fileno(): peer for peer, link in sockets.items()}
        self.poll = select.poll()
        for number in self.peers:
            self.poll.register(number, select.POLLIN)

    def signal(self, comm: SharedComm) -> None:
        """Tells the group's other ranks that this rank's data is in its buffer."""
        for peer in comm.others:
            try:
                self.sockets[peer].send(comm.byte)
            except ConnectionError:
                pass  # whoever still needs the peer's data finds out

    def complete(self, operation: Operation) -> None:
        """Works on the operation until it is done. Where it has to wait, on this rank's other groups: so two ranks may
        wait for the collectives of two groups in different order."""
        comm, deadline = operation.comm, time.monotonic() + self.timeout
        while not operation.done:
            if comm.advance():
                deadline = time.monotonic() + self.timeout
            elif not any([other.advance() for other in self.comms]):
                self._await(comm, deadline)
        self.heart.beats += 1

    def _await(self, comm: SharedComm, deadline: float) -> None:
        """Returns when any peer has sent something; raises PeerLost when one the group waits for is dead or late."""
        lacking = [peer for peer in comm.others if self.arrived[peer][comm.channel] < comm.phase]
        dead = [peer for peer in lacking if peer in self.gone]
        if dead:
            raise PeerLost(f"rank {dead[0]} is gone: its connection is closed")
        for _ in range(SPINS):
            if self._receive(0):
                return
        with self.heart.waits():
            news = self._receive(max(0.0, deadline - time.monotonic()))
        if not news:
            raise PeerLost(f"no data from rank {', '.join(map(str, lacking))} within {self.timeout:g} s")

    def _receive(self, seconds: float) -> bool:
        """Counts the bytes that have come, each by its channel; whether there was news."""
        events = self.poll.poll(seconds * 1000)
        for number, _ in events:
            peer = self.peers[number]
            try:
                data = self.sockets[peer].recv(1 << 12)
            except ConnectionError:  # it died with bytes of ours unread
                data = b""
            if not data:
                self.gone.add(peer)
                self.poll.unregister(number)
            for channel in data:
                self.arrived[peer][channel] += 1
        return bool(events)


class SharedComm(Comm):
    """A group of ranks on one machine; `buffers` [2, size, CHUNK] are the group's bytes of the shared memory."""

    via = "shared memory"

    def __init__(self, ranks: Sequence[int], rank: int, host: Host, channel: int, buffers: torch.Tensor) -> None:
        super().__init__(ranks, rank)
        self.host, self.channel, self.buffers = host, channel, buffers
        self.byte = bytes([channel])
        self.others = [peer for peer in ranks if peer != rank]
        self.phase = 0  # bytes sent to each peer, and awaited from each
        self.turn = 0
        self.queue: deque[Operation] = deque()
        host.comms.add(self)

    def start_all_reduce_(self, x: torch.Tensor, op: str = "sum") -> Operation:
        return self._start(self._all_reduce(x.view(-1), OPS[op]))

    def start_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Operation:
        return self._start(self._reduce_scatter(out.view(-1), flat.view(self.size, out.numel())))

    def start_all_gather(self, out: torch.Tensor, flat: torch.Tensor) -> Operation:
        return self._start(self._all_gather(out.view(self.size, flat.numel()), flat.view(-1)))

    def advance(self) -> bool:
        """Goes on with the oldest operations as far as the peers' data is there; whether anything was done."""
        moved = False
        while self.queue and all(self.host.arrived[peer][self.channel] >= self.phase for peer in self.others):
            moved = True
            try:
                next(self.queue[0].steps)
            except StopIteration:
                self.queue.popleft().done = True
            else:
                self.phase += 1
                self.host.signal(self)
        return moved

    def _start(self, steps: Steps) -> Operation:
        operation = Operation(self, steps)
        self.queue.append(operation)
        self.advance()
        return operation

    def _next_buffers(self, dtype: torch.dtype) -> torch.Tensor:
        """The buffers of all ranks for the next chunk: [size, elements]."""
        self.turn = 1 - self.turn
        return self.buffers[self.turn].view(dtype)

    def _all_reduce(self, x: torch.Tensor, op: Callable[..., torch.Tensor]) -> Steps:
        """Two ranks reduce whole chunks each; more ranks a part each, which the others then copy."""
        for chunk in x.split(CHUNK // x.element_size()):
            held = self._next_buffers(x.dtype)[:, : chunk.numel()]
            held[self.rank].copy_(chunk)
            yield
            if self.size == 2 or chunk.nbytes <= SMALL:
                combine(held.unbind(), op, chunk)
                continue
            mine = chunk.tensor_split(self.size)[self.rank]
            parts = [row.tensor_split(self.size) for row in held.unbind()]  # [rank that wrote][rank that reduces]
            combine([row[self.rank] for row in parts], op, mine)
            parts[self.rank][self.rank].copy_(mine)
            yield
            for rank, part in enumerate(chunk.tensor_split(self.size)):
                if rank != self.rank:
                    part.copy_(parts[rank][rank])

    def _reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Steps:
        """out [n], flat [size, n]: row i is for rank i."""
        step = CHUNK // flat.element_size() // self.size
        for mine, chunk in zip(out.split(step), flat.split(step, 1), strict=True):
            held = self._next_buffers(flat.dtype)[:, : chunk.numel()].view(self.size, *chunk.shape)
            for rank in range(self.size):
                if rank != self.rank:
                    held[self.rank, rank].copy_(chunk[rank])
            yield
            combine([chunk[rank] if rank == self.rank else held[rank, self.rank] for rank in range(self.size)],
                    torch.add, mine)

    def _all_gather(self, out: torch.Tensor, flat: torch.Tensor) -> Steps:
        """out [size, n], flat [n]."""
        step = CHUNK // flat.element_size()
        for mine, chunk in zip(flat.split(step), out.split(step, 1), strict=True):
            held = self._next_buffers(flat.dtype)[:, : mine.numel()]
            held[self.rank].copy_(mine)
            yield
            for rank in range(self.size):
                chunk[rank].copy_(mine if rank == self.rank else held[rank])


def combine(parts: Sequence[torch.Tensor], op: Callable[..., torch.Tensor], out: torch.Tensor) -> None:
    """out = parts[0] op parts[1] op ..., in this order; half precision is summed in fp32 and rounded once."""
    if out.dtype in HALF:
        total = parts[0].float()
        for part in parts[1:]:
            op(total, part, out=total)
        out.copy_(total)
        return
    op(parts[0], parts[1], out=out)
    for part in parts[2:]:
        op(out, part, out=out)


def share(groups: Mapping[str, Sequence[Sequence[int]]], rank: int, world: int, timeout: float,
          heart: Heart) -> tuple[list[int], dict[str, Comm]]:
    """Called by all ranks of the world (a gloo group) at once. Returns a number for each rank's machine, and this
    rank's groups that lie on its own; where a rank cannot share memory it says why, and every rank counts as alone."""
    token = secrets.randbits(62)
    listener, problem = None, ""
    try:
        listener = meeting.listen(token)
    except OSError as error:
        problem = str(error)
    table = torch.empty(world * 2, dtype=torch.int64)
    all_gather_flat(table, torch.tensor([meeting.machine(), token]))
    hosts = table[0::2].tolist()
    near = [r for r in range(world) if hosts[r] == hosts[rank]]
    found: dict[str, Comm] = {}
    if listener is not None and len(near) > 1:
        try:
            with listener:
                found = _open(groups, rank, near, listener, int(table[near[0] * 2 + 1]), timeout, heart)
        except OSError as error:
            problem = str(error) or type(error).__name__
    if problem:
        print(f"rank {rank}: no shared memory with the ranks of this machine ({problem}); gloo carries the collectives",
              file=sys.stderr, flush=True)
    failures = torch.tensor(len(problem))
    dist.all_reduce(failures)
    return (list(range(world)), {}) if failures else (hosts, found)


def _open(groups: Mapping[str, Sequence[Sequence[int]]], rank: int, near: Sequence[int], listener: socket.socket,
          token: int, timeout: float, heart: Heart) -> dict[str, Comm]:
    """Meets the machine's other ranks and cuts the memory into each group's buffers, alike on all of them."""
    places = [(name, channel, ranks) for channel, (name, lists) in enumerate(groups.items())
              for ranks in lists if set(ranks) <= set(near)]
    sizes = [2 * len(ranks) * CHUNK for _, _, ranks in places]
    memory, sockets = meeting.meet(rank, near, listener, token, sum(sizes))
    host = Host(sockets, len(groups), timeout, heart)
    return {name: SharedComm(ranks, rank, host, channel, part.view(2, len(ranks), CHUNK))
            for (name, channel, ranks), part in zip(places, memory.split(sizes), strict=True) if rank in ranks}
