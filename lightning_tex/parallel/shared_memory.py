"""Memory that the ranks of a group on one host share: what one sends is copied there once, and read where it lies.

Gloo sends over TCP inside a host, too: it copies twice, and its threads wake and spin at both ends. Here a message is a
place in the sender's memory and a few bytes in a pipe; the receiver waits for those and takes, or adds up, what is
there. Nothing runs beside the ranks' own threads. A rank that dies closes its pipes, which the others see.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import select
import struct
import sys
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel.errors import UserRuntimeError

# Groups of more ranks have no such memory: each rank has a pipe to each other.
MOST_RANKS = 16
# Groups have such memory where this variable of the environment is 1.
SETTING = "LIGHTNING_TEX_SHARED_MEMORY"

_HEADER = struct.Struct("<QQQQ")  # the message's number, messages the sender is done with, first byte, bytes
_ALIGNMENT = 64
_GROWTH = 1 << 20


class Segment:
    """Memory of one rank, which it writes and others read.

    Args:
        file: it has no name and is gone with the last process that has it open.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._taken: list[tuple[int, int, int]] = []  # first byte, behind the last, message's number
        _close_with(self, file)

    def reserve(self, number: int, size: int, done: int) -> int:
        """The first byte of a place for a message. Places of the first ``done`` messages are free."""
        self._taken = [place for place in self._taken if place[2] > done]
        start = 0
        for i, (begin, end, _) in enumerate([*self._taken, (sys.maxsize, 0, 0)]):
            if begin - start >= size:
                self._taken.insert(i, (start, start + size, number))
                break
            start = end
        if start + size > len(self._bytes):
            os.ftruncate(self._file, -(-(start + size) // _GROWTH) * _GROWTH)
        return start

    def at(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What lies there, as a tensor."""
        size = dtype.itemsize * torch.Size(shape).numel()
        if start + size > len(self._bytes):
            whole = mmap.mmap(self._file, os.fstat(self._file).st_size)
            self._bytes = torch.frombuffer(whole, dtype=torch.uint8)
        return self._bytes[start : start + size].view(dtype).view(shape)


class Peer:
    """Another rank.

    Args:
        rank: in the group.
        segment: its memory.
        reading, writing: ends of the pipes from it and to it.
        timeout: of one message.

    Attributes:
        done: messages of this rank that it does not read any more.
    """

    def __init__(self, rank: int, segment: Segment, reading: int, writing: int, timeout: timedelta) -> None:
        self.rank, self.segment, self.done = rank, segment, 0
        self._reading, self._writing, self._seconds = reading, writing, timeout.total_seconds()
        self._poll = select.poll()
        self._poll.register(reading, select.POLLIN)
        self._headers: dict[int, tuple[int, int]] = {}
        self._rest = b""
        _close_with(self, reading, writing)

    def tell(self, number: int, done: int, start: int, size: int) -> None:
        """This rank's message lies there."""
        try:
            os.write(self._writing, _HEADER.pack(number, done, start, size))
        except BrokenPipeError as error:
            raise self._gone() from error

    def message(self, number: int) -> tuple[int, int]:
        """First byte and size of its message of that number, waited for."""
        until = monotonic() + self._seconds
        while number not in self._headers:
            if not self._poll.poll(max(0.0, until - monotonic()) * 1e3):
                raise RuntimeError(
                    f"timed out after {self._seconds:g} s in a collective, waiting for rank {self.rank} of the group"
                )
            read = os.read(self._reading, 64 * _HEADER.size)
            if not read:
                raise self._gone()
            self._rest += read
            whole = len(self._rest) // _HEADER.size * _HEADER.size
            for its, done, start, size in _HEADER.iter_unpack(self._rest[:whole]):
                self.done, self._headers[its] = done, (start, size)
            self._rest = self._rest[whole:]
        return self._headers.pop(number)

    def _gone(self) -> RuntimeError:
        return UserRuntimeError(f"another rank has gone: connection closed by peer, rank {self.rank} of the group")


def _close_with(owner: object, *files: int) -> None:
    for file in files:
        weakref.finalize(owner, os.close, file).atexit = False


class SharedMemory:
    """Of one group, as one rank sees it. Messages are numbered: all ranks send the same number in one collective.

    Args:
        rank: of this one.
        own: its memory.
        peers: the others, by rank.

    Attributes:
        size: ranks of the group.
        others: those of the peers, in ascending order.
    """

    def __init__(self, rank: int, own: Segment, peers: dict[int, Peer]) -> None:
        self.rank, self.size, self.others = rank, len(peers) + 1, tuple(peers)
        self._own, self._peers = own, peers
        self._number = 0
        self._reading: set[int] = set()

    def send(self, parts: Sequence[Tensor]) -> int:
        """One part to each rank, this one left out; one tensor for several of them is copied once.

        Returns:
            the number by which :meth:`received` finds what others sent at the same time. After that,
            :meth:`finished` has to be called.
        """
        self._number = number = self._number + 1
        self._reading.add(number)
        distinct = {id(part): part for rank, part in enumerate(parts) if rank != self.rank}
        sizes = {key: -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for key, part in distinct.items()}
        start = self._own.reserve(number, sum(sizes.values()), min(peer.done for peer in self._peers.values()))
        starts = {}
        for key, part in distinct.items():
            starts[key], start = start, start + sizes[key]
            self._own.at(starts[key], part.shape, part.dtype).copy_(part.detach())
        done = min(self._reading) - 1
        for rank, peer in self._peers.items():
            peer.tell(number, done, starts[id(parts[rank])], parts[rank].nbytes)
        return number

    def received(self, number: int, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Another rank's part for this one, waited for; to be read until :meth:`finished`.

        Raises:
            RuntimeError: it has gone, or sent something else.
        """
        peer = self._peers[rank]
        start, size = peer.message(number)
        expected = dtype.itemsize * torch.Size(shape).numel()
        if size != expected:
            raise RuntimeError(
                f"rank {rank} of the group sent {size} bytes where {expected} were expected (shape {list(shape)}, "
                f"{dtype}): ranks are in different collectives, or disagree on sizes"
            )
        return peer.segment.at(start, shape, dtype)

    def finished(self, number: int) -> None:
        """What was received is not read any more."""
        self._reading.discard(number)


_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, list[SharedMemory | None]] = weakref.WeakKeyDictionary()


def shared_memory(group: dist.ProcessGroup | None) -> SharedMemory | None:
    """That of a group of gloo whose ranks are on one host, where it is asked for; ``None``: it has none.

    Collective on the first call.
    """
    if group is None:
        return None
    if group not in _of_group:
        _of_group[group] = [_join(group) if _may_join(group) else None]
    return _of_group[group][0]


def _may_join(group: dist.ProcessGroup) -> bool:
    """What all ranks answer alike."""
    return (
        1 < group.size() <= MOST_RANKS
        and os.environ.get(SETTING) == "1"
        and sys.platform == "linux"
        and "cpu:gloo" in str(dist.get_backend_config(group))
        # With it torch compares what ranks call: that has to pass through torch.
        and dist.get_debug_level() != dist.DebugLevel.DETAIL
    )


def _join(group: dist.ProcessGroup) -> SharedMemory | None:
    rank, size = group.rank(), group.size()
    file = os.memfd_create("lightning_tex")
    pipes = {other: os.pipe() for other in range(size) if other != rank}  # to each of them
    ends = [pipes[other][0] if other in pipes else -1 for other in range(size)]
    own = torch.tensor([_host(), os.getpid(), file, *ends])
    every = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(every, own, group=group)
    opened: dict[int, tuple[int, int]] = {}
    with contextlib.suppress(OSError):
        for other in pipes:
            host, process, its_file, *its_ends = every[other].tolist()
            if host != int(own[0]):
                break
            folder = f"/proc/{process}/fd"
            memory = os.open(f"{folder}/{its_file}", os.O_RDWR)
            opened[other] = memory, os.open(f"{folder}/{its_ends[rank]}", os.O_RDONLY)
    all_opened = torch.tensor(int(len(opened) == len(pipes)))
    dist.all_reduce(all_opened, dist.ReduceOp.MIN, group=group)
    for end, _ in pipes.values():  # or nobody would see that its reader has gone
        os.close(end)
    if not all_opened:
        for number in (file, *(end for _, end in pipes.values()), *(n for both in opened.values() for n in both)):
            os.close(number)
        return None
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    peers = {o: Peer(o, Segment(memory), end, pipes[o][1], timeout) for o, (memory, end) in opened.items()}
    return SharedMemory(rank, Segment(file), peers)


def _host() -> int:
    """What processes have in common that can open each other's files: a machine that runs, and what they see of it."""
    seen = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.getuid())]
    seen += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid", "user")]
    return int.from_bytes(hashlib.sha256("".join(seen).encode()).digest()[:7], "big")
