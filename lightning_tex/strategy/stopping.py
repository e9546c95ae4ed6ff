"""Stopping together: a signal to a rank, or a limit of time, ends all ranks at one step, with a complete checkpoint.

At the end of every step ranks vote (:class:`~lightning_tex.strategy.ballot.Ballot`). What one was asked meanwhile is
then asked of all; before the next step they save and leave, so that no rank waits for one that has gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_tex.resilience.processes import end_process, say
from lightning_tex.resilience.signals import STOP_SIGNALS, StopSignals, exit_code
from lightning_tex.resilience.star import current_star
from lightning_tex.resilience.vote import Vote
from lightning_tex.saving import Location, at, paths
from lightning_tex.saving.newest import STOPPED
from lightning_tex.saving.random_streams import random_streams, restore_random_streams
from lightning_tex.strategy.ballot import Ballot
from lightning_tex.strategy.checkpoint_folders import checkpoint_folder
from lightning_tex.strategy.time_limits import TimeLimits

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy

# What a rank asks for is the number of the signal that it was sent, or this one.
_TIME_LIMIT = int(max(signal.Signals)) + 1


class StoppedTogether(SIGTERMException):
    """All ranks stop here, as one of them was asked to; nothing went wrong.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(exit_code(number))


class Stopping:
    """Notes signals while a stage of the Trainer runs, lets ranks agree at every boundary, and saves before they leave.

    Args:
        strategy: of the run.
        trainer: whose fit, validation, test or prediction it is.
    """

    def __init__(self, strategy: CheckpointingStrategy, trainer: Trainer) -> None:
        self._strategy, self.trainer = strategy, trainer
        self._environment: Any = strategy.cluster_environment
        name = f"[rank {strategy.global_rank}]"
        self._signals = StopSignals(self._stop_signals(), name, self._end_at_once)
        self._ballot: Ballot | None = None
        self._in_stage = False
        self._limits = TimeLimits(trainer)
        self._random_in_validation: dict[str, Any] = {}

    def _stop_signals(self) -> set[signal.Signals]:
        requeue = self._environment.requeue_signal if self._requeues else signal.SIGUSR1
        return {*STOP_SIGNALS, requeue}

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """Those that ask a run to stop."""
        return self._signals.signals

    @property
    def _requeues(self) -> bool:
        environment = self._environment
        return isinstance(environment, SLURMEnvironment) and environment.auto_requeue

    # --- around a stage

    def begin(self) -> None:
        """A stage begins: note signals, and vote about them."""
        if self._ballot is None:
            self._ballot = Ballot(self.trainer, Vote(self._strategy.topology.host, current_star()), self._asked)
        self._limits = TimeLimits(self.trainer)
        self._in_stage = True
        loop: Any = self.trainer.fit_loop.epoch_loop
        advance = loop.advance

        def advance_together(data_fetcher: Any) -> None:
            self._strategy.step_boundary()
            self.step_boundary()
            advance(data_fetcher)
            self._limits.batch_ended()

        # There is no hook between two batches. In Lightning's own vote only rank 0 counts, and it waits for the device.
        loop.advance = advance_together
        loop._broadcast_sigterm_tensor = _no_vote
        self._ballot.install()
        self._signals.install()

    def end(self) -> None:
        """The stage has ended, in whatever way."""
        self._signals.restore()
        self._in_stage = False
        loop = self.trainer.fit_loop.epoch_loop
        for name in ("advance", "_broadcast_sigterm_tensor"):
            vars(loop).pop(name, None)
        if self._ballot is not None:
            self._ballot.remove()

    def _end_at_once(self, number: int) -> None:
        launcher: Any = self._strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        end_process(128 + number)

    # --- boundaries

    def step_boundary(self) -> None:
        """Between two batches of a fit, after a ballot; collective where something is saved.

        Raises:
            StoppedTogether: a rank was sent a signal; a complete checkpoint is written.
            StopIteration: the time is up; a complete checkpoint is written, and the fit ends as Lightning ends it.
        """
        if not self._in_stage or self.trainer.fit_loop._should_accumulate():
            return
        assert self._ballot is not None
        self._random_in_validation = {}
        self._limits.step_begins()
        number, rank = self._ballot.outcome
        if number == _TIME_LIMIT:
            self._stop_in_time(rank)
            raise StopIteration
        if number:
            self._save_and_leave(number, f"{signal.Signals(number).name} on rank {rank}")

    def evaluation_boundary(self) -> None:
        """Before an evaluation step, which all ranks take equally often; collective.

        When the time is up a complete checkpoint is written, and the validation is run to its end.

        Raises:
            StoppedTogether: a rank was sent a signal; inside a fit, a complete checkpoint is written: validation is run
                again by a run that goes on from it.
        """
        if not self._in_stage:
            return
        assert self._ballot is not None
        if self._validates_in_fit and not self._random_in_validation:
            self._random_in_validation = random_streams()
        number, rank = self._ballot.hold()
        if not number:
            return
        if number == _TIME_LIMIT:
            with self._as_validation_began():
                self._stop_in_time(rank)
            return
        why = f"{signal.Signals(number).name} on rank {rank}"
        if not self._validates_in_fit:
            self._say(f"stopping: {why}")
            self._leave(number)
        with self._as_validation_began():
            self._save_and_leave(number, why)

    @property
    def _validates_in_fit(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and self.trainer.validating

    def _asked(self) -> int:
        if self._signals.requested:
            return int(self._signals.requested)
        fits = self.trainer.state.fn == TrainerFn.FITTING
        return _TIME_LIMIT if fits and self._limits.near() else 0

    # --- what a stop does

    def _stop_in_time(self, rank: int) -> None:
        """Save, and let the fit end as Lightning ends it."""
        self._limits.reached = True
        if self._requeues:
            self._save_and_leave(self._environment.requeue_signal, "the end of the job's time")
        self._save(f"the time is up on rank {rank}")
        rank_zero_info("Time limit reached. Signaling Trainer to stop.")  # as Lightning's Timer, which is late then
        self.trainer.should_stop = True

    def _save_and_leave(self, number: int, why: str) -> None:
        if self._requeues:
            self._save_for_requeue(number, why)
        else:
            self._save(why)
        self._leave(number)

    def _leave(self, number: int) -> None:
        self.trainer._signal_connector.received_sigterm = number == signal.SIGTERM
        self._signals.forget()
        raise StoppedTogether(number)

    def _save(self, why: str) -> None:
        """Write a complete checkpoint beside the run's other ones; collective."""
        step, folder = self.trainer.global_step, checkpoint_folder(self.trainer)
        if folder is None:
            self._say(f"stopping after step {step}: {why}; the Trainer has checkpoints switched off, so none is saved")
            return
        self._say(f"stopping after step {step}: {why}; saving")
        path = folder / f"{STOPPED}{step}.ckpt"
        self._write(path)
        self._remove_older(path)  # a later stop replaces it
        self._say(f"saved {path}; ckpt_path='last' (--ckpt_path last) goes on from it")

    def _write(self, path: Location) -> None:
        began = time.monotonic()
        self._strategy.save_complete(self.trainer, path)
        self._limits.save_took(time.monotonic() - began)

    def _remove_older(self, path: Location) -> None:
        if self._strategy.is_global_zero:
            for older in paths.entries(path.parent):
                if older != path and fnmatchcase(older.name, f"{STOPPED}*.ckpt"):
                    self._strategy.remove_checkpoint(older)

    def _save_for_requeue(self, number: int, why: str) -> None:
        """Save where Lightning looks for it in a requeued job, and requeue it, if the signal asks for that."""
        trainer = self.trainer
        path = at(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
        self._say(f"stopping after step {trainer.global_step}: {why}; saving {path}")
        self._write(path)
        if number == self._environment.requeue_signal and self._strategy.is_global_zero:
            _requeue(self._say)

    @contextmanager
    def _as_validation_began(self) -> Iterator[None]:
        """Save what a validation at its first step would leave, so that who goes on runs it whole."""
        progress = self.trainer.fit_loop.epoch_loop.val_loop.batch_progress
        done: int = progress.current.completed
        _rewind(progress, done)
        now = random_streams()
        restore_random_streams(self._random_in_validation)
        try:
            yield
        finally:
            restore_random_streams(now)
            _rewind(progress, -done)

    def _say(self, text: str) -> None:
        if self._strategy.is_global_zero:
            say(f"lightning_tex: {text}")


def _rewind(progress: Any, batches: int) -> None:
    for tracker in (progress.total, progress.current):
        tracker.ready, tracker.started = tracker.ready - batches, tracker.started - batches
        tracker.processed, tracker.completed = tracker.processed - batches, tracker.completed - batches


def _no_vote() -> None:
    """Lightning's vote about SIGTERM, which :meth:`Stopping.step_boundary` replaces."""


def _requeue(say: Any) -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array is not None else os.environ["SLURM_JOB_ID"]
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        say(f"job {job} is not requeued: {error}")
        return
    say(f"job {job} is requeued" if result.returncode == 0 else f"job {job} is not requeued: {result.stderr.strip()}")


class AgreedSignals(_SignalConnector):
    """In place of Lightning's: its handlers communicate inside a signal, which hangs ranks that were not sent one."""

    def __init__(self, trainer: Trainer, stopping: Stopping) -> None:
        super().__init__(trainer)
        self._stopping = stopping

    def register_signal_handlers(self) -> None:
        """A stage begins."""
        self.received_sigterm = False
        self._stopping.begin()

    def teardown(self) -> None:
        """It has ended."""
        self._stopping.end()
