"""A few small numbers of every rank to the first one and back, by a TCP connection each: at every step, by the host.

Of so little a collective of gloo is nearly all waiting: a ring of 2 (ranks - 1) hops, in each of which a thread wakes
another one. Here a vote is one message of every rank and one answer.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Sequence
from contextlib import closing, suppress
from datetime import timedelta
from hmac import compare_digest
from time import monotonic

import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.resilience.wire import connected, keep_from_children, listener

_NUMBER_BYTES = 8
# Seconds that the first rank listens at a time, and that all others have to connect.
_LISTENS, _LATEST = 0.05, 60.0


class Star:
    """This rank's end, or on the first rank all of them.

    Args:
        connections: to the first rank; on that one to all others.
        is_first: whether this is the first rank.
        timeout: after which a rank that does not answer is taken for gone.
    """

    def __init__(self, connections: Sequence[socket.socket], is_first: bool, timeout: timedelta) -> None:
        self._group = dist.group.WORLD
        self._connections, self._is_first = list(connections), is_first
        for connection in self._connections:
            keep_from_children(connection)
            connection.settimeout(timeout.total_seconds())
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serves(self, group: object) -> bool:
        """Whether it belongs to this process group."""
        return self._group is group

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Of each number, 64 bits with a sign, the highest of all ranks'; called by all of them with equally many.

        Raises:
            RuntimeError: a rank has gone.
        """
        try:
            if not self._is_first:
                (first,) = self._connections
                first.sendall(_packed(numbers))
                return _received(first, len(numbers))
            of_all = [numbers, *(_received(connection, len(numbers)) for connection in self._connections)]
            highest = [max(each) for each in zip(*of_all, strict=True)]
            answer = _packed(highest)
            for connection in self._connections:
                connection.sendall(answer)
        except OSError as error:
            raise UserRuntimeError(f"another rank has gone: {error}") from error
        return highest

    def close(self) -> None:
        """Let go of the connections."""
        for connection in self._connections:
            connection.close()


def _packed(numbers: Sequence[int]) -> bytes:
    return b"".join(number.to_bytes(_NUMBER_BYTES, "little", signed=True) for number in numbers)


def _received(connection: socket.socket, count: int) -> list[int]:
    length, received = count * _NUMBER_BYTES, b""
    while len(received) < length:
        read = connection.recv(length - len(received))
        if not read:
            raise ConnectionResetError("its connection is closed")
        received += read
    places = range(0, length, _NUMBER_BYTES)
    return [int.from_bytes(received[place : place + _NUMBER_BYTES], "little", signed=True) for place in places]


_star: Star | None = None
_joined = 0  # process groups so far


def current_star() -> Star | None:
    """That of this process's group, if all of its ranks are connected."""
    return _star if _star is not None and _star.serves(dist.group.WORLD) else None


def join_star(address: str, one_host: bool, timeout: timedelta) -> Star | None:
    """Connect this rank, once for each process group; called by all ranks.

    The first rank's port and a token travel through the process group's store. ``None``, on all ranks, in a world of
    one process, or of pretended ones, and where some rank does not reach the first one's host.

    Args:
        address: of the first rank's host.
        one_host: whether all ranks are there.
        timeout: of :class:`Star`.
    """
    global _star, _joined
    if dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return None
    if (star := current_star()) is not None:
        return star
    if _star is not None:
        _star.close()
    _joined += 1
    store = PrefixStore(f"lightning_tex/star/{_joined}", _get_default_store())
    is_first = dist.get_rank() == 0
    connections = _accepted(store, address, one_host) if is_first else _connected(store, address)
    if store.get("joined") == b"all":
        _star = Star(connections, is_first, timeout)
    else:
        for connection in connections:
            connection.close()
        _star = None
    return _star


def _accepted(store: PrefixStore, address: str, one_host: bool) -> list[socket.socket]:
    """On the first rank: the others, in any order; says whether they are all."""
    token, others = secrets.token_hex(16), dist.get_world_size() - 1
    found: list[socket.socket] = []
    with closing(listener(address, one_host)) as listening:
        keep_from_children(listening)
        listening.settimeout(_LISTENS)
        store.set("place", json.dumps({"port": listening.getsockname()[1], "token": token}))
        until = monotonic() + _LATEST
        while len(found) < others and monotonic() < until:
            with suppress(TimeoutError):
                connection, _ = listening.accept()
                if _is_ours(connection, token):
                    found.append(connection)
                continue
            if store.check(["unreachable"]):
                break
    store.set("joined", "all" if len(found) == others else "some")
    return found


def _is_ours(connection: socket.socket, token: str) -> bool:
    """Whether who has connected knows the token."""
    connection.settimeout(1.0)
    said = b""
    with suppress(OSError):
        while len(said) < len(token) and (read := connection.recv(len(token) - len(said))):
            said += read
    if compare_digest(said, token.encode()):
        return True
    connection.close()
    return False


def _connected(store: PrefixStore, address: str) -> list[socket.socket]:
    """On another rank: the first one."""
    place = json.loads(store.get("place"))
    try:
        connection = connected(address, place["port"]).connection
        connection.sendall(place["token"].encode())
    except OSError:
        store.set("unreachable", "")
        return []
    return [connection]
