"""A run among others of its kind: the first error is told by the rank it is of, all others follow it and say so."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_tex.parallel.errors import is_consequence
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.resilience.monitor import Monitor, current_monitor, join_monitor
from lightning_tex.resilience.processes import failing, say, stopped, through
from lightning_tex.resilience.signals import SUPERVISED
from lightning_tex.resilience.telling import described, mark_told, tell
from lightning_tex.resilience.verdict import Report, Verdict
from lightning_tex.saving import Search
from lightning_tex.strategy.checkpoint_folders import places
from lightning_tex.strategy.stopping import StoppedTogether


class GuardedRun:
    """What a strategy does for one rank of a run beside training. With one process: nothing."""

    def __init__(self) -> None:
        self._monitor: Monitor | None = None
        self._inside = False
        self._held_back = ExitStack()
        self._trainer: Trainer | None = None
        self._advises_at_last = False

    @contextmanager
    def frame(self, trainer: Trainer) -> Iterator[None]:
        """Around a whole run on this rank, from before set-up until its error, if any, has passed."""
        self._held_back.close()
        self._advises_at_last = False
        through.clear()
        stopped.clear()
        if trainer.world_size == 1:
            yield
            return
        self._inside, self._trainer = True, trainer
        self._enter(current_monitor())
        try:
            yield
            if self._monitor is not None:
                self._monitor.wait_for_all()
        except StoppedTogether:
            self._inside = False
            stopped.set()
            self.leave()
            raise
        except BaseException as error:
            self._inside = False
            if self._monitor is not None and not self._monitor.nested:
                self._end(trainer, error, self._monitor)
            raise
        through.set()
        self._inside = False
        self.leave()

    def connect(
        self,
        address: str,
        one_host: bool,
        child_ending: Callable[[int], str],
        timeout: timedelta,
        device_waits: Callable[[], bool],
    ) -> None:
        """Once the processes have found each other; called by all ranks.

        Args:
            address: of rank 0's host.
            one_host: whether all ranks are there.
            child_ending: how a process that this one has started has ended.
            timeout: after which a collective that has not returned is a stall.
            device_waits: whether the device has work that does not end.
        """
        monitor = join_monitor(address, one_host, child_ending)
        if monitor is not None:
            monitor.timeout_s, monitor.device_waits = timeout.total_seconds(), device_waits
            monitor.advice = self._advice
            if self._inside:
                self._enter(monitor)

    def _enter(self, monitor: Monitor | None) -> None:
        if monitor is not None and self._monitor is None:
            self._monitor = monitor
            monitor.enter()

    def leave(self) -> None:
        """The run has ended here: by itself, or after an error all the way to the strategy's teardown."""
        if self._monitor is not None and not self._inside:
            if self._advises_at_last and (advice := self._advice()):
                say(advice)
            self._advises_at_last = False
            self._monitor.leave()
            self._monitor = None

    def _end(self, trainer: Trainer, error: BaseException, monitor: Monitor) -> None:
        follows = is_consequence(error)
        rank, step = trainer.global_rank, trainer.global_step
        kind = "consequence" if follows else "error"
        verdict = monitor.report(Report(rank, kind, described(error), step, TRAINING.number))  # type: ignore[arg-type]
        TRAINING.leave()
        if verdict is not None and not verdict.ends_others and verdict.text and rank:
            mark_told(error)  # rank 0 says it for all
        # Where all have raised, hooks may still save.
        self._advises_at_last = rank == 0 and verdict is not None and not verdict.ends_others
        if verdict is not None and verdict.kind == "together":
            return
        if verdict is None or verdict.ends_others:
            failing.set()
            self._print(error, verdict, rank, step, monitor)
        self._hold_back_saves(trainer, verdict, rank)

    def _print(self, error: BaseException, verdict: Verdict | None, rank: int, step: int, monitor: Monitor) -> None:
        if verdict is None:  # rank 0 is busy or gone
            tell(error, rank, socket.gethostname(), step)
        elif verdict.kind == "error" and rank in verdict.ranks:
            tell(error, rank, socket.gethostname(), step)
            if advice := self._advice():
                say(advice)
            monitor.printed()
        else:
            mark_told(error)

    def _advice(self) -> str:
        """Where a fit that has failed goes on; nothing where something starts it again, or there is no checkpoint."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or SUPERVISED in os.environ:
            return ""
        newest = next(iter(Search(places(trainer))), None)
        if newest is None:
            return ""
        return (
            f"lightning_tex: the newest complete checkpoint is {newest.path}, step {newest.step}; ckpt_path='last' "
            "(--ckpt_path last) goes on from it"
        )

    def _hold_back_saves(self, trainer: Trainer, verdict: Verdict | None, rank: int) -> None:
        """A checkpoint takes all ranks: hooks that save one on an exception would wait for those that are gone."""
        speaks = verdict is None or rank in verdict.ranks or (verdict.kind != "error" and rank == verdict.speaker)
        refusal = _Refusal(trainer, rank, silent=not speaks)
        for callback in _callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
                refusal()
                callback.save_on_exception = False
                self._held_back.callback(setattr, callback, "save_on_exception", True)
        trainer.save_checkpoint = refusal  # type: ignore[method-assign]
        self._held_back.callback(delattr, trainer, "save_checkpoint")


class _Refusal:
    """In place of ``Trainer.save_checkpoint``: says once that nothing is saved, and which checkpoint there is.

    Args:
        trainer: the Trainer.
        rank: this rank.
        silent: another rank says it.
    """

    def __init__(self, trainer: Trainer, rank: int, silent: bool) -> None:
        self._trainer, self._rank, self._said = trainer, rank, silent

    def __call__(self, *_: Any, **__: Any) -> None:
        if self._said:
            return
        self._said = True
        newest = next(iter(Search(places(self._trainer))), None)
        there = "there is no complete one yet" if newest is None else f"the newest complete one is {newest.path}"
        say(
            f"[rank {self._rank}] no checkpoint is saved on this error: that takes all ranks, and not all raised it; "
            f"{there}"
        )


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]
