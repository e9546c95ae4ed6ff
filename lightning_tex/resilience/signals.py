"""Signals that ask a process to stop: noted when they come, acted on when the run is at a point that can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

# A launcher may pass on what its processes got from the terminal already: the same signal so soon is one.
_ONE_GESTURE = 0.05  # s

# Set by who starts runs again: there Ctrl-C and a failure need different exit codes.
SUPERVISED = "LIGHTNING_TEX_SUPERVISED"

# A third signal of one process ends it without waiting.
_AT_ONCE = 3


class StopSignals:
    """Notes the first signal that asks to stop; the third ends the process at once.

    Args:
        signals: that ask to stop.
        name: of the process, in what it prints.
        end_at_once: called with the number of the third signal; does not return.
    """

    def __init__(self, signals: Iterable[signal.Signals], name: str, end_at_once: Callable[[int], None]) -> None:
        self._signals = tuple(signals)
        self._name = name
        self._end_at_once = end_at_once
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._received = 0
        self._last = (0, 0.0)
        self.requested: signal.Signals | None = None

    def install(self) -> None:
        """Note signals from now on. In another thread than the main one: nothing, Python allows no handlers there.

        Handlers of the user's own stay, and for SIGTERM are called as well.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            before = signal.getsignal(number)
            of_the_user = callable(before) and before is not signal.default_int_handler
            if of_the_user and number != signal.SIGTERM:
                continue
            self._handlers_before[number] = before
            signal.signal(number, self._receive)

    def restore(self) -> None:
        """Give signals back to the handlers of before."""
        for number, handler in self._handlers_before.items():
            if handler is not None:  # one that was not installed by Python cannot be given back
                signal.signal(number, handler)
        self._handlers_before.clear()

    def forget(self) -> None:
        """What was asked is done."""
        self.requested, self._received = None, 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
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
            self.requested = signal.Signals(number)
            self._say(f"{name}: all ranks stop after this step; a third signal ends at once")
        else:
            self._say(f"{name}: already stopping")
        before = self._handlers_before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def _say(self, text: str) -> None:
        # Not through a buffer: the signal may have come in the middle of another write to it.
        os.write(2, f"{self._name} {text}\n".encode())


def exit_code(number: int) -> int:
    """Of a run that a signal stopped: 1 after Ctrl-C, as Lightning's, else 128 and the number, as a shell's."""
    return 1 if number == signal.SIGINT and SUPERVISED not in os.environ else 128 + number
