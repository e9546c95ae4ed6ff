"""Signals that ask a process to stop: noted when they come, acted on when the run is at a point that can be saved."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar

# A launcher may pass on what its processes got from the terminal already: the same signal so soon is one.
_ONE_GESTURE = 0.05  # s

# They ask every run to stop; beside them the one that a scheduler requeues a job with, SIGUSR1 if none is known.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Set by who starts runs again: there Ctrl-C and a failure need different exit codes.
SUPERVISED = "LIGHTNING_TEX_SUPERVISED"

# A third signal of one process ends it without waiting.
_AT_ONCE = 3


class StopSignals:
    """Notes the first signal that asks to stop; the third ends the process at once.

    Python runs handlers between two of its own instructions, and so not while the process waits in a collective.
    Signals are told and counted by a thread, which hears of them when they come.

    Args:
        signals: that ask to stop.
        name: of the process, in what it prints.
        end_at_once: called with the number of the third signal, by that thread; does not return.
    """

    def __init__(self, signals: Iterable[signal.Signals], name: str, end_at_once: Callable[[int], None]) -> None:
        self.signals = tuple(signals)
        self._name = name
        self._end_at_once = end_at_once
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._arrivals: _Arrivals | None = None
        self._process = os.getpid()
        self._received = 0
        self._last = (0, 0.0)
        self.requested: signal.Signals | None = None

    def install(self) -> None:
        """Note signals from now on. In another thread than the main one: nothing, Python allows no handlers there.

        Handlers of the user's own stay, and for SIGTERM are called as well. SIGHUP stays ignored, as under ``nohup``.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        self._arrivals = _Arrivals.begin(self._arrived)
        for number in self.signals:
            before = signal.getsignal(number)
            of_the_user = callable(before) and before is not signal.default_int_handler
            if (of_the_user and number != signal.SIGTERM) or (before == signal.SIG_IGN and number == signal.SIGHUP):
                continue
            self._handlers_before[number] = before
            signal.signal(number, self._receive)

    def restore(self) -> None:
        """Give signals back to the handlers of before."""
        for number, handler in self._handlers_before.items():
            if handler is not None:  # one that was not installed by Python cannot be given back
                signal.signal(number, handler)
        self._handlers_before.clear()
        if self._arrivals is not None:
            self._arrivals.end()
            self._arrivals = None

    def forget(self) -> None:
        """What was asked is done."""
        self.requested, self._received = None, 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if number == signal.SIGHUP:
            _let_go_of_lost_outputs(0)
            threading.Thread(target=_let_go_of_lost_outputs, args=(None,), daemon=True).start()
        if self.requested is None:
            self.requested = signal.Signals(number)
        if self._arrivals is None:
            self._arrived(number)
        before = self._handlers_before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def _arrived(self, number: int) -> None:
        if number not in self._handlers_before:
            return
        now = time.monotonic()
        copied = self._last[0] == number and now - self._last[1] < _ONE_GESTURE
        self._last = (number, now)
        if copied:
            return
        self._received += 1
        name = signal.Signals(number).name
        if self._received >= _AT_ONCE:
            self._say(f"{name} for the third time: ends at once")
            self._end_at_once(number)
        elif self._received == 1:
            self._say(f"{name}: all ranks stop after this step; a third signal ends at once")
        else:
            self._say(f"{name}: already stopping")

    def _say(self, text: str) -> None:
        # Not through a buffer: the signal may have come in the middle of another write to it.
        with suppress(OSError):  # a terminal that is gone
            os.write(2, f"{self._name} {text}\n".encode())


class _Arrivals(threading.Thread):
    """Hears of signals when they come, whatever the main thread does.

    Args:
        heard: called with a signal's number.
    """

    descriptors: ClassVar[set[int]] = set()

    def __init__(self, heard: Callable[[int], None]) -> None:
        super().__init__(name="lightning_tex signals", daemon=True)
        self._heard = heard
        self._numbers, self._written = socket.socketpair()
        self._written.setblocking(False)
        self.descriptors.add(self._written.fileno())

    @classmethod
    def begin(cls, heard: Callable[[int], None]) -> _Arrivals | None:
        """``None``: somebody else, such as asyncio, hears of them."""
        arrivals = cls(heard)
        before = signal.set_wakeup_fd(arrivals._written.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            arrivals._close()
            return None
        arrivals.start()
        return arrivals

    def run(self) -> None:
        with self._numbers:
            while numbers := self._numbers.recv(64):
                for number in numbers:
                    self._heard(number)

    def end(self) -> None:
        """Called by the main thread."""
        signal.set_wakeup_fd(-1)
        self._close()
        self.join(timeout=1.0)  # it may be writing where nobody reads

    def _close(self) -> None:
        self.descriptors.discard(self._written.fileno())
        self._written.close()


def _in_a_forked_child() -> None:
    """Its signals are not its parent's."""
    with suppress(ValueError):  # in another thread
        before = signal.set_wakeup_fd(-1)
        if before not in _Arrivals.descriptors:
            signal.set_wakeup_fd(before)


os.register_at_fork(after_in_child=_in_a_forked_child)


def _let_go_of_lost_outputs(seconds: float | None) -> None:
    """Write nowhere what would go to a terminal that is gone, or to the likes of ``tee`` that go with it.

    The next line of a progress bar would end the run by an error, and Python ends by 120 where it cannot write what its
    buffers hold.

    Args:
        seconds: to wait for that; ``None``: until all of them are gone.
    """
    watched, lost = {1, 2}, select.POLLERR | select.POLLHUP
    while watched:
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor, 0)
        events = poll.poll(None if seconds is None else seconds * 1000)
        watched -= {descriptor for descriptor, _ in events}
        if not events:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor, event in events:
            if event & lost:
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def exit_code(number: int) -> int:
    """Of a run that a signal stopped: 1 after Ctrl-C, as Lightning's, else 128 and the number, as a shell's."""
    return 1 if number == signal.SIGINT and SUPERVISED not in os.environ else 128 + number
