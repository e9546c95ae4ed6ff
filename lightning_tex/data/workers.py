"""Workers of data loaders: signals that are meant for their rank, a worker that died, and what one could not read."""

from __future__ import annotations

import atexit
import mmap
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from lightning_tex.parallel.errors import UserError, UserRuntimeError

_GRACE = 0.5  # s, from a read that has failed until the system tells of the death of the process at its other end


class _Ending:
    """A byte that a process shares with workers forked from it: whether it ends. Each process has its own."""

    def __init__(self) -> None:
        self._owner, self._byte = 0, mmap.mmap(-1, 1)

    def of_this_process(self) -> mmap.mmap:
        if self._owner != os.getpid():  # or it would be that of the process this one was forked from
            self._owner, self._byte = os.getpid(), mmap.mmap(-1, 1)
        return self._byte


_ending = _Ending()


class SparedWorker:
    """How a forked worker begins: what asks all processes of a run to stop does not end it, as its rank still reads.

    Schedulers, and kill of a process group, send signals to workers too. The one that a rank ends its workers with when
    it ends itself is heeded. Under ``spawn``, only what the user asked for is done.

    Args:
        signals: that ask a run to stop.
        then: the user's ``worker_init_fn``.
    """

    def __init__(self, signals: Sequence[signal.Signals], then: Callable[[int], None]) -> None:
        self._signals, self._then = signals, then
        self._rank_ends = _ending.of_this_process()

    def __call__(self, worker_id: int) -> None:
        for number in self._signals:
            signal.signal(number, self._left_to_the_rank)
            signal.siginterrupt(number, False)
        self._then(worker_id)

    def _left_to_the_rank(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM and self._rank_ends[0]:
            os._exit(0)

    def __reduce__(self) -> Any:
        return _as_it_is, (self._then,)


def _as_it_is(value: Any) -> Any:
    return value


@atexit.register  # before multiprocessing ends its processes, and waits for them
def _end_workers() -> None:
    _ending.of_this_process()[0] = 1


def end_workers(batches: Any) -> None:
    """End the workers of a loader's iterator now: after an error, torch waits for them when it is collected."""
    end = getattr(batches, "_shutdown_workers", None)
    if end is not None:
        end()


@contextmanager
def named_worker_errors(rank: int) -> Iterator[None]:
    """Around a run: a worker that died is named with its likely reason, and what one raised is told by its last line.

    Args:
        rank: of this process.

    Raises:
        RuntimeError: a worker died, or raised; where it refused something by name, an error of that type.
    """
    try:
        yield
    except Exception as error:
        text, death = str(error), _death(error)
        if death is not None:
            raise UserRuntimeError(f"rank {rank}: {_first_words(death)}: {_likely_reason()}") from error
        if not (text.startswith("Caught ") and "in DataLoader worker process" in text):
            raise
        # torch raises the same type again, with the worker's traceback for its message.
        if isinstance(error, UserError):
            _, _, said = text.rpartition(f"{type(error).__name__}: ")
            raise type(error)(f"rank {rank}: {said.strip()}") from None
        last_line = text.strip().rpartition("\n")[2]
        raise UserRuntimeError(f"rank {rank}: a DataLoader worker raised {last_line}\n{text}") from None


def _death(error: Exception) -> str | None:
    """What torch says of a worker that died; None if none did.

    torch says it wherever the process is when it hears of the death, which may be after a read from the dead worker
    has failed, and even in the teardown that follows. Asked for, it says it once.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return str(error)
    until = time.monotonic() + (_GRACE if isinstance(error, (OSError, EOFError)) else 0)
    try:
        _error_if_any_worker_fails()
        while time.monotonic() < until:
            time.sleep(0.01)
            _error_if_any_worker_fails()
    except RuntimeError as death:
        return str(death)
    return None


def _first_words(text: str) -> str:
    """torch's own words, without the advice that follows them."""
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")


def _likely_reason() -> str:
    free_mib = shutil.disk_usage("/dev/shm").free / 2**20
    return (
        "something outside of Python ended it, likely for want of memory (the kernel's log tells of an out-of-memory "
        f"kill) or of shared memory (/dev/shm has {free_mib:.0f} MiB free; a container gets more by --shm-size). "
        "Legal: fewer workers or num_workers=0, smaller batches, more memory"
    )
