"""JSON lines over a TCP connection."""

from __future__ import annotations

import json
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from os import register_at_fork
from typing import Any

Message = dict[str, Any]

# A forked child, such as a data loader's worker, must not keep a dead rank's connection open.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_children(connection: socket.socket) -> None:
    """Close it in every process that is forked from this one."""
    _sockets.add(connection)


def _close_inherited() -> None:
    for connection in list(_sockets):
        connection.close()


register_at_fork(after_in_child=_close_inherited)


class Lines:
    """One end of a connection.

    Args:
        connection: a connected socket.
        longest: bytes that a line may have, lest a stranger fills the memory.
    """

    def __init__(self, connection: socket.socket, longest: int = 1 << 20) -> None:
        keep_from_children(connection)
        self.connection = connection
        self._longest = longest
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send it. To a peer that is gone: nothing; what reads will know."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._sending, suppress(OSError):
            self.connection.sendall(line)

    def receive(self) -> Iterator[Message]:
        """The messages that are there. Called when there is something to read.

        Raises:
            EOFError: the peer is gone, or is none of ours.
        """
        try:
            read = self.connection.recv(1 << 16)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return
        except OSError as error:
            raise EOFError from error
        if not read:
            raise EOFError
        *lines, self._rest = (self._rest + read).split(b"\n")
        if len(self._rest) > self._longest:
            raise EOFError
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError as error:
                raise EOFError from error
            if not isinstance(message, dict):
                raise EOFError
            yield message

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self.connection.close()


def listener(address: str, one_host: bool) -> socket.socket:
    """At the interface of the run's main address.

    At all of them where that address is not one of this host's, or is one that other hosts do not reach: many a host
    calls itself 127.0.1.1.
    """
    family, _, _, _, sockaddr = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    reachable = one_host or not ip_address(str(sockaddr[0])).is_loopback
    try:
        listening.bind(sockaddr if reachable else ("", 0))
    except OSError:
        listening.bind(("", 0))
    listening.listen(1024)
    return listening


def connected(host: str, port: int) -> Lines:
    """A connection to a listener.

    Raises:
        OSError: there is none that can be reached.
    """
    connection = socket.create_connection((host, port), timeout=10.0)
    connection.settimeout(1.0)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Lines(connection)
