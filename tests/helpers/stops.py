"""Runs whose ranks something happens to: started as users start them, watched until no process of theirs is left.

:func:`run_to_its_end` starts a function on ranks in one of the ways of :data:`LAUNCHERS`, in a session of its own,
and gives an :class:`Ending`: when the last process was gone, all that was printed, exit codes. The function makes a
Trainer and fits. What happens, and where, is an :class:`Incident`, a callback that acts on one rank at one point
(``forward``, ``backward``, ``optimizer``, ``validation``, ``save``) of one step: it calls any function of
:data:`DEEDS`, such as ``raise`` or ``SIGKILL``. To do something from outside instead, such as a signal to the
launcher, give ``meanwhile``, which is called with the ranks' process numbers once the run has come to the point of an
incident whose deed is ``say``.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.distributed as dist

from helpers.stopwatch import Elapsed, seconds_waited_for_a_cpu
from lightning_tex.parallel import collectives
from lightning_tex.saving import latest
from lightning_tex.strategy.launcher import RankLauncher
from lightning_tex.strategy.tex_moe import TexMoEStrategy
from lightning_tex.testing.ranks import reserved_port

POINTS = ("forward", "backward", "optimizer", "validation", "save")
# Before ranks have a Trainer; once rank 0 has started the others, who do not know each other yet; in the setup hook.
EARLY = ("start", "launch", "setup")
# "own": rank 0 starts the others, by forks; "external": somebody else has started all.
LAUNCHERS = ("own", "external")


# Commands are to import what the tests import, also where another copy is installed.
_TESTS = Path(__file__).parents[1]
_OF_COMMANDS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{_TESTS}:{_TESTS.parent}"}


def _raise(_: L.Trainer) -> None:
    raise ValueError("what this rank cannot do\nsecond line")


def _out_of_memory(_: L.Trainer) -> None:
    raise MemoryError("no room for [4, 4]")


def _say(_: L.Trainer) -> None:
    time.sleep(600)


def _skip_a_collective(trainer: L.Trainer) -> None:
    """All others do one more."""
    world = TexMoEStrategy.of(trainer).topology.world
    if trainer.global_rank != Incident.of(trainer).rank:
        collectives.all_reduce(torch.ones(3), world)


def _other_shape(trainer: L.Trainer) -> None:
    """A collective of another shape than the others'."""
    world = TexMoEStrategy.of(trainer).topology.world
    size = 4000 if trainer.global_rank == Incident.of(trainer).rank else 3
    collectives.all_gather(torch.ones(size), 0, world)


def _signal(number: signal.Signals) -> Callable[[L.Trainer], None]:
    return lambda _: os.kill(os.getpid(), number)


# What may happen to a rank. Of those in TO_ALL, every rank does its part.
DEEDS: dict[str, Callable[[L.Trainer], None]] = {
    "raise": _raise,
    "MemoryError": _out_of_memory,
    "exit": lambda _: os._exit(3),
    "busy": _say,
    "goes on": lambda _: None,
    "skip": _skip_a_collective,
    "shape": _other_shape,
    **{name: _signal(signal.Signals[name]) for name in ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT", "SIGUSR1")},
}
TO_ALL = ("skip", "shape")


def _note(name: str, text: str) -> None:
    """Write a small file that is never seen half written."""
    partial = Path(f"{name}.{os.getpid()}")
    partial = partial.with_name(f".{partial.name}")
    partial.write_text(text)
    partial.rename(name)


class Incident(L.Callback):
    """Something happens on a rank, once.

    Args:
        deed: a key of DEEDS.
        rank: to which; -1: all.
        point: where in a step; see POINTS, and EARLY and ``end``, where the step does not count.
        step: optimizer steps done by then.
        saved: wait there for a complete checkpoint, which may be written beside training.
    """

    def __init__(self, deed: str, rank: int, point: str = "forward", step: int = 2, saved: bool = False) -> None:
        self.deed, self.rank, self.point, self.step, self.saved = deed, rank, point, step, saved

    @classmethod
    def of(cls, trainer: L.Trainer) -> Incident:
        return next(callback for callback in trainer.callbacks if isinstance(callback, cls))

    def _at(self, point: str, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            self.early(point, trainer.global_rank, trainer)

    def early(self, point: str, rank: int, trainer: L.Trainer | None = None) -> None:
        """Be at a point, on this rank."""
        if point != self.point:
            return
        mine = self.rank in (-1, rank)
        while mine and self.saved and latest(Path("checkpoints")) is None:
            time.sleep(0.01)
        if mine:
            _note(f"happened.{rank}", str(time.time()))
        if mine or self.deed in TO_ALL:
            DEEDS[self.deed](trainer)  # type: ignore[arg-type]  # those of TO_ALL are not for early points

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _note(f"process.{trainer.global_rank}", str(os.getpid()))
        self.early("setup", trainer.global_rank, trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("forward", trainer)

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: torch.Tensor) -> None:
        loss.register_hook(lambda _: self._at("backward", trainer))

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("optimizer", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("save", trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.early("end", trainer.global_rank, trainer)


@dataclass
class Ending:
    """What a run has come to.

    Args:
        text: what its processes printed, in the order in which they did.
        took: from the incident until no process was left.
        codes: exit codes by rank, negative for signals; of ranks whose end was seen.
        left: processes that had to be ended.
    """

    text: str
    took: Elapsed
    codes: dict[int, int]
    left: list[int] = field(default_factory=list)

    def took_less_than(self, seconds: float) -> bool:
        """Whether it ended by itself in so many seconds of a machine that has nothing else to do."""
        return not self.left and self.took.is_within(seconds)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def line_of(self, part: str) -> int:
        """The first line that holds it."""
        return next(i for i, line in enumerate(self.lines) if part in line)


def run_to_its_end(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    launcher: str = "own",
    within: float = 5.0,
    start: float = 60.0,
    meanwhile: Callable[[dict[int, int]], None] | None = None,
) -> Ending:
    """Run ``function(*args)`` on ranks, in ``folder``, until none of its processes is left.

    Args:
        world: ranks.
        launcher: one of LAUNCHERS.
        within: seconds from the incident, or from what ``meanwhile`` did, that the run may take to end.
        start: seconds that it may take until then.
        meanwhile: called with process numbers by rank once all incidents have begun.
    """
    with reserved_port() as port, (folder / "output.txt").open("w") as output, _adopting():
        supervisor = os.fork()
        if supervisor == 0:
            _become_a_session(output.fileno(), folder)
            _supervise(world, port, launcher, function, args)
        while os.getsid(supervisor) != supervisor:
            time.sleep(0.001)
        return _watched(supervisor, folder, within, start, meanwhile)


def run_command(
    command: list[str],
    *,
    folder: Path,
    within: float = 5.0,
    start: float = 120.0,
    meanwhile: Callable[[dict[int, int]], None] | None = None,
    **environment: str,
) -> Ending:
    """The same for a command, such as ``lightning-tex`` or torchrun; ``codes[0]`` is its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with (folder / "output.txt").open("w") as output, _adopting():
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited | _OF_COMMANDS | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _note(str(folder / f"rank.{process.pid}"), "0")
        ending = _watched(process.pid, folder, within, start, meanwhile)
        process.wait()  # it has ended, which Popen does not know yet
        return ending


def _watched(
    session: int,
    folder: Path,
    within: float,
    start: float,
    meanwhile: Callable[[dict[int, int]], None] | None,
) -> Ending:
    codes: dict[int, int] = {}
    until, since, waited = time.time() + start, 0.0, seconds_waited_for_a_cpu()
    try:
        while _alive(session) and time.time() < until + _MOST_PATIENCE * (seconds_waited_for_a_cpu() - waited):
            _reap(codes)
            if not since and (times := [float(p.read_text()) for p in folder.glob("happened.*")]):
                if meanwhile is not None:
                    numbers = {int(p.suffix[1:]): int(p.read_text()) for p in folder.glob("process.*")}
                    meanwhile(numbers)
                    times = [time.time()]
                since = min(times)
                until = since + within
                waited = seconds_waited_for_a_cpu()
            time.sleep(0.02)
        took = Elapsed(time.time() - since, seconds_waited_for_a_cpu() - waited)
    finally:
        left = _alive(session)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap(codes, until=time.time() + 5)  # of a process with threads the first may end before it can be waited for
    ranks = {int(p.suffix[1:]): int(p.read_text()) for p in folder.glob("rank.*")}
    by_rank = {ranks[pid]: code for pid, code in codes.items() if pid in ranks}
    for path in folder.glob("code.*"):
        by_rank.setdefault(ranks[int(path.suffix[1:])], int(path.read_text()))
    return Ending((folder / "output.txt").read_text(), took, by_rank, left)


# Of the time in which processes wait for a CPU, the share by which a run may take longer.
_MOST_PATIENCE = 0.8


@contextmanager
def _adopting() -> Iterator[None]:
    """Orphans become this process's children, so that none is overlooked."""
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(set_child_subreaper, 1)
    try:
        yield
    finally:
        prctl(set_child_subreaper, 0)


def _alive(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                alive.append(int(path.parent.name))
    return alive


def _reap(codes: dict[int, int], until: float = 0.0) -> None:
    """Exit codes of the session's processes that are this one's children, or have become so."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.time() >= until:
            return
        else:
            time.sleep(0.02)


def _become_a_session(output: int, folder: Path) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    print_to_descriptors()
    os.chdir(folder)


def print_to_descriptors() -> None:
    """As a new interpreter does, and not to where pytest has led it."""
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.excepthook = sys.__excepthook__


class _Forked:
    """A forked process with Popen's face."""

    def __init__(self, rank: int, run: Callable[[], None]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _as_rank(rank, run)
        _note(f"rank.{self.pid}", str(rank))

    def poll(self) -> int | None:
        if self.returncode is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    _note(f"code.{self.pid}", str(self.returncode))
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _supervise(world: int, port: int, launcher: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """In the session's first process: rank 0 of the launcher's own kind, or the one who starts all."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", NODE_RANK="0")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if launcher == "own":

        def fork_children(self: RankLauncher) -> None:
            os.environ.update(LOCAL_RANK="0", WORLD_SIZE=str(world))
            self.procs = [_Forked(rank, lambda: function(*args)) for rank in range(1, world)]

        RankLauncher._call_children_scripts = fork_children  # type: ignore[method-assign]
        _note(f"rank.{os.getpid()}", "0")
        to_the_end(lambda: function(*args))
    os.environ["WORLD_SIZE"] = str(world)
    ranks = [_Forked(rank, lambda: function(*args)) for rank in range(world)]
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    os._exit(0)


def _as_rank(rank: int, run: Callable[[], None]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    to_the_end(run)


def to_the_end(run: Callable[[], Any]) -> NoReturn:
    """As an interpreter would: report what is uncaught, call what is registered for the end, go."""
    code = 1
    try:
        code = _ended(run)
        sys.stdout.flush()
    except OSError:  # where nobody reads
        code = 120
    finally:
        os._exit(code)


def _ended(run: Callable[[], Any]) -> int:
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    return code
