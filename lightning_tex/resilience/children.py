"""The process that starts a node's ranks, and the ranks it has started: none is left behind when another has gone."""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic, sleep

from lightning_tex.resilience.processes import end_process, ending, failing, on_end, say, through

# Holds the launching process's number, for the ranks it starts.
LAUNCHER = "LIGHTNING_TEX_LAUNCHER"
_POLL_S = 0.1
# Seconds: for a rank whose parent or child has gone before they were connected to end by itself; after that, for the
# monitor to end this rank; for children to end when this process does by an error; and when it is through.
_UNCONNECTED_S, _CONNECTED_S, _REAP_S, _GONE_ON_S = 1.5, 6.0, 3.0, 10.0

Connected = Callable[[], bool]  # whether this rank's monitor is


class Children(threading.Thread):
    """Watches the ranks that this process has started, and ends them where it ends by an error.

    Args:
        processes: of the ranks that follow this one.
        rank: this one's.
        connected: see :data:`Connected`.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], rank: int, connected: Connected) -> None:
        super().__init__(name="lightning_tex children", daemon=True)
        self._processes, self._rank, self._connected = processes, rank, connected
        on_end(self.kill)
        atexit.register(self._at_exit)

    def run(self) -> None:
        while not any(self._codes()):
            if None not in self._codes():
                return
            sleep(_POLL_S)
        sleep(_CONNECTED_S if self._connected() else _UNCONNECTED_S)
        index, code = next((index, code) for index, code in enumerate(self._codes(), start=1) if code)
        say(f"[rank {self._rank}] ended: rank {self._rank + index} {ending(code)}")
        end_process()

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def ending(self, pid: int) -> str:
        """How the process of that number has ended; empty if it is none of these, or has not ended after a moment."""
        for process in self._processes:
            if process.pid == pid:
                with suppress(subprocess.TimeoutExpired):
                    return ending(process.wait(timeout=0.5))
        return ""

    def kill(self) -> None:
        """End those that still run."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_REAP_S)

    def _at_exit(self) -> None:
        """The command ends with its processes, and fails where one of them does."""
        if failing.is_set():
            self._wait(_REAP_S)
            self.kill()
        elif self._connected():  # they end with the run, in whatever way, unless the script goes on
            self._wait(_GONE_ON_S)
            if through.is_set():
                self._end_as_they_did()

    def _wait(self, seconds: float) -> None:
        until = monotonic() + seconds
        while None in self._codes() and monotonic() < until:
            sleep(_POLL_S / 2)

    def _end_as_they_did(self) -> None:
        for index, code in enumerate(self._codes(), start=1):
            if code:
                say(f"[rank {self._rank}] ended: rank {self._rank + index} {ending(code)}")
                end_process()


def watch_parent(rank: int, connected: Connected) -> None:
    """In a rank that a launching process has started: end when that has gone before this rank is connected."""
    parent = int(os.environ.pop(LAUNCHER, 0))
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            if connected():
                return
            sleep(_POLL_S)
        sleep(_UNCONNECTED_S)
        say(f"[rank {rank}] ended: the process that had started it is gone")
        end_process()

    threading.Thread(target=watch, name="lightning_tex parent", daemon=True).start()
