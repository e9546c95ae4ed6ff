"""A training that one rank ends early (``trainer.should_stop``, say by its own clock) ends on all ranks there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Trainer

from lightning_tex.resilience.vote import Vote


class EarlyEnd:
    """Ranks agree on ``trainer.should_stop`` wherever Lightning's loops are about to look at it.

    Args:
        trainer: whose training it is.
        vote: of all ranks.
    """

    def __init__(self, trainer: Trainer, vote: Vote) -> None:
        self._trainer, self._vote = trainer, vote
        fit: Any = trainer.fit_loop
        self._after = ((fit, "on_run_start"), (fit, "on_advance_end"), (fit.epoch_loop.val_loop, "run"))
        self._before = ((fit.epoch_loop, "on_advance_end"),)  # which validates for whoever stops

    def install(self) -> None:
        """A stage begins."""
        for loop, name in self._after:
            setattr(loop, name, self._then_agree(getattr(loop, name)))
        for loop, name in self._before:
            setattr(loop, name, self._agree_first(getattr(loop, name)))

    def remove(self) -> None:
        """It has ended."""
        for loop, name in (*self._after, *self._before):
            vars(loop).pop(name, None)

    def _then_agree(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def with_agreement(*args: Any) -> Any:
            result = act(*args)
            self._agree()
            return result

        return with_agreement

    def _agree_first(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def with_agreement(*args: Any) -> Any:
            self._agree()
            return act(*args)

        return with_agreement

    def _agree(self) -> None:
        """Collective."""
        number, _ = self._vote.highest(int(self._trainer.should_stop))
        self._trainer.should_stop = bool(number)
