"""A folder that processes fill together, on one machine or several; what is done is kept when they die."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from lightning_tex.parallel.errors import UserRuntimeError

Told = Callable[[int, int], None]  # tokens and rows that have been added
_LOOK_AGAIN = 0.2  # s, between looks at what others work at


class Job:
    """A part of the work: does it unless it is done.

    Args:
        mark: the file whose presence says that it is done, below the folder.
        do: does it, given where that file is to be, and tells how far it is.
        rows: of it.
    """

    def __init__(self, mark: Path, do: Callable[[Path, Told], None], rows: int) -> None:
        self.mark, self.do, self.rows = mark, do, rows


def draft_of(folder: Path) -> Path:
    """Where a folder lies that is not complete yet."""
    return folder.parent / f".{folder.name}"


def build_together(
    folder: Path, jobs: list[Job], finish: Callable[[Path], None], processes: int, told: Told = lambda *_: None
) -> Path:
    """Fill a folder by jobs, which it appears complete with or not at all.

    Meanwhile it is a draft beside it, of a fixed name, in which every other call for the same folder takes part, on
    this machine or on another that sees it. A job is one process's while that holds a lock on a file, which the system
    lets go of when it dies; where the file system has no locks, processes do each other's work, to the same result.

    Args:
        folder: is made.
        jobs: in any order; the same list wherever this is called.
        finish: is called with the draft when all are done, by one process.
        processes: to fork; 1: do them in this one.
        told: is called in this process.

    Raises:
        RuntimeError: a process died; with its signal.
        Exception: what a job raised.
    """
    draft = draft_of(folder)
    for place in {draft, *((draft / job.mark).parent for job in jobs)}:
        place.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # finished by others meanwhile
        shutil.rmtree(draft, ignore_errors=True)
        return folder
    processes = min(processes, len(jobs))
    if processes > 1 and not multiprocessing.current_process().daemon:
        _fork(draft, jobs, processes, told)
    else:
        _take_part(draft, jobs, 0, told)
    with _locked(draft / "finish.lock", wait_for_it=True):
        if draft.exists() and not folder.exists():
            finish(draft)
            for lock in draft.rglob("*.lock"):
                lock.unlink()
            draft.rename(folder)
    return folder


def _take_part(
    draft: Path, jobs: list[Job], first: int, told: Told, goes_on: Callable[[], bool] = lambda: True
) -> None:
    """Do what nobody does, and wait for what others do, until all is done."""
    left = jobs[first:] + jobs[:first]
    while draft.exists():
        left = [job for job in left if not (draft / job.mark).exists()]
        if not left or not goes_on():
            return
        worked = False
        for job in left:
            mark = draft / job.mark
            with _locked(mark.with_suffix(".lock")) as mine:
                if mine and not mark.exists() and draft.exists():
                    job.do(mark, told)
                    worked = True
            if not goes_on():
                return
        if not worked:
            time.sleep(_LOOK_AGAIN)


@contextmanager
def _locked(path: Path, wait_for_it: bool = False) -> Iterator[bool]:
    """Whether this process has a file to itself: False if another one does, or the folder has been finished."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(descriptor, wait_for_it)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait_for_it: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait_for_it else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


# --- processes of this machine


def _fork(draft: Path, jobs: list[Job], count: int, told: Told) -> None:
    context = multiprocessing.get_context("fork")
    readers: dict[Any, Any] = {}
    try:
        for number in range(count):
            reader, writer = context.Pipe(duplex=False)
            first = number * len(jobs) // count
            process = context.Process(target=_forked, args=(os.getpid(), writer, draft, jobs, first))
            with warnings.catch_warnings():  # Python 3.12 warns of threads, none of which is needed in there
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                process.start()
            writer.close()
            readers[reader] = process
        _listen(readers, told)
    finally:
        for process in readers.values():
            process.kill()
            process.join()


def _listen(readers: dict[Any, Any], told: Told) -> None:
    """What the processes say, until all have ended well or one has not."""
    open_ones = set(readers)
    while open_ones:
        for reader in wait(list(open_ones)):
            try:
                said = cast(Connection, reader).recv()
            except EOFError:
                open_ones.discard(reader)
                process = readers[reader]
                process.join()
                if process.exitcode:
                    raise UserRuntimeError(_death(process.exitcode)) from None
                continue
            if isinstance(said, BaseException):
                raise said
            told(*said)


def _death(exit_code: int) -> str:
    name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return (
        f"a process that prepares the data has ended by {name}, likely for want of memory; legal: fewer processes "
        "(num_proc). What is done is kept: prepare again, and it goes on"
    )


def _forked(parent: int, writer: Connection, draft: Path, jobs: list[Job], first: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not as a run's ranks take it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    try:
        _take_part(draft, jobs, first, lambda *said: writer.send(said), lambda: os.getppid() == parent)
    except BrokenPipeError:  # the parent has died
        return
    except BaseException as error:
        with suppress(BrokenPipeError):
            writer.send(_sendable(error))


def _sendable(error: BaseException) -> BaseException:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
