"""Processes as the system shows them: alike on one host, their state, how they ended; and the end of this one."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
}


class ProcessId(NamedTuple):
    """A process, told from another that has its number later.

    Args:
        host: its host's name.
        pid: its number there.
        started: when, in the system's clock ticks; 0 where there is no ``/proc``.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        fields = _stat(os.getpid())
        return cls(socket.gethostname(), os.getpid(), int(fields[19]) if fields else 0)

    def state(self) -> str:
        """What it is doing, in a word or three; empty for one that cannot be seen from here."""
        fields = self._seen()
        return _STATES.get(fields[0], fields[0]) if fields else ""

    def ending(self, within: float = 0.1) -> str:
        """How it ended, for a process of any parent on this host; empty where that is not seen.

        The system keeps it from a process's end until its parent asks.

        Args:
            within: seconds in which it may end.
        """
        until = monotonic() + within
        while (fields := self._seen()) and monotonic() < until:
            if fields[0] == "Z":
                return ending(os.waitstatus_to_exitcode(int(fields[49])))
            sleep(0.001)
        return ""

    def kill(self) -> None:
        """SIGKILL, if it runs on this host."""
        if self._seen():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)

    def _seen(self) -> list[str]:
        """Its fields in ``/proc``, from the state on; none for one of another host, or of another start."""
        fields = _stat(self.pid) if self.host == socket.gethostname() else []
        return fields if fields and int(fields[19]) == self.started else []


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()  # a command's name may hold anything


def ending(returncode: int) -> str:
    """How a child ended, from ``Popen.returncode``."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (the system does that when host memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def say(text: str) -> None:
    """To standard error, at once and in one piece."""
    with suppress(OSError, ValueError):  # closed
        try:
            sys.stderr.write(f"{text}\n")
        except UnicodeEncodeError:
            sys.stderr.write(f"{text.encode('ascii', 'backslashreplace').decode()}\n")
        sys.stderr.flush()


def stacks() -> str:
    """The Python stacks of this process's threads, but for the one that asks."""
    frames = sys._current_frames()
    return "\n".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident])).rstrip()}"
        for thread in threading.enumerate()
        if thread.ident in frames and thread is not threading.current_thread()
    )


# Set once the run has failed, so that this process will end by an error.
failing = threading.Event()
# Set while the last run of this process has ended as it should; or, on all ranks, because it was asked to.
through = threading.Event()
stopped = threading.Event()

# What this process has started besides multiprocessing's children, and how to end it.
_started: list[Callable[[], None]] = []


def on_end(end: Callable[[], None]) -> None:
    """Call it before :func:`end_process` ends this process."""
    _started.append(end)


def end_process_at_the_latest(seconds: float) -> None:
    """End this process after that time even if a call holds Python's lock, as gloo's do now and then when ranks die."""
    with suppress(OSError, ValueError, RuntimeError):  # no room for its thread
        faulthandler.dump_traceback_later(seconds, exit=True, file=os.open(os.devnull, os.O_WRONLY))


def end_process(code: int = 1) -> None:
    """End this process and all it has started, whatever its threads are doing."""
    for child in multiprocessing.active_children():
        with suppress(OSError, ValueError):
            child.kill()
    for end in _started:
        end()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
