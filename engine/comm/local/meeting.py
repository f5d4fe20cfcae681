"""How the ranks of one Linux machine come to share memory and sockets: the first one makes them and hands them out.

Nothing has a name in any folder, so nothing is left behind whatever dies: the memory is an anonymous file (memfd, which
a small /dev/shm does not limit) and the ranks meet at an abstract socket, whose random number they tell each other
before. Only processes of the same user are let in.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

SECONDS = 30.0
"""How long a rank waits for the others; they have all just spoken to each other."""
Sockets = dict[int, socket.socket]


def machine() -> int:
    """The same number for processes that can reach each other's abstract sockets: host, boot and network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    facts = [socket.gethostname(), boot.read_text() if boot.exists() else "", str(os.stat("/proc/self/ns/net").st_ino)]
    return int.from_bytes(hashlib.sha256(" ".join(facts).encode()).digest()[:7])


def listen(token: int) -> socket.socket:
    """Opens the place where the ranks meet, should this one be the first of its machine. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(_address(token))
    listener.listen(128)
    listener.settimeout(SECONDS)
    return listener


def meet(rank: int, near: Sequence[int], listener: socket.socket, token: int,
         size: int) -> tuple[torch.Tensor, Sockets]:
    """`size` bytes that all ranks in `near` share, and a socket to each of them. `token` is that of the first one's
    listener. Raises OSError where a rank cannot have them."""
    memory, sockets = _hand_out(near, listener, size) if rank == near[0] else _fetch(rank, near, token)
    try:
        return torch.frombuffer(mmap.mmap(memory, size), dtype=torch.uint8), sockets
    finally:
        os.close(memory)


def _hand_out(near: Sequence[int], listener: socket.socket, size: int) -> tuple[int, Sockets]:
    links: Sockets = {}
    while len(links) < len(near) - 1:
        link, _ = listener.accept()
        link.settimeout(SECONDS)
        if _is_mine(link):
            links[int(link.recv(16))] = link
    memory = os.memfd_create("triax")
    os.ftruncate(memory, size)
    for peer, link in links.items():
        socket.send_fds(link, [b"%d" % peer], [memory])
    kept: Sockets = {}
    for pair in combinations(near, 2):
        for here, there, end in zip(pair, reversed(pair), socket.socketpair(), strict=True):
            if here == near[0]:
                kept[there] = end
            else:
                socket.send_fds(links[here], [b"%d" % there], [end.fileno()])
                end.close()
    for link in links.values():
        link.close()
    return memory, kept


def _fetch(rank: int, near: Sequence[int], token: int) -> tuple[int, Sockets]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(SECONDS)
        link.connect(_address(token))
        if not _is_mine(link):
            raise PermissionError("another user answered")
        link.send(b"%d" % rank)
        got: dict[int, int] = {}
        while len(got) < len(near):  # the memory, under this rank's own number, and a socket to each of the others
            data, files, _, _ = socket.recv_fds(link, 16, 1, socket.MSG_CMSG_CLOEXEC)
            if not files:
                raise ConnectionError(f"rank {near[0]} gave up")
            got[int(data)] = files[0]
    return got.pop(rank), {peer: socket.socket(fileno=number) for peer, number in got.items()}


def _address(token: int) -> bytes:
    """An abstract name."""
    return b"\0triax-%x" % token


def _is_mine(link: socket.socket) -> bool:
    """Whether the other side is a process of the same user."""
    _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())
