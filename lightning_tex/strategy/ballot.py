"""What one rank asks for, all hear before Lightning's loops go on: the end of the training, a stop, a validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_tex.resilience.vote import Highest, Vote

Agrees = Callable[[Callable[..., Any]], Callable[..., Any]]


class Ballot:
    """One vote about all that may end a training: ``trainer.should_stop`` of a rank, and what else it asks for.

    It is held wherever Lightning is about to look at ``should_stop``: after every batch, before the validation that
    whoever stops may run; after a validation; where an epoch or the run begins or ends. So its outcome is known when
    the next batch begins, and a step has one vote. A module with an ``on_train_batch_start`` of its own, which may end
    the epoch by -1, has another one there.

    Args:
        trainer: whose training it is.
        vote: of all ranks.
        asked: what this rank asks for, as a number; 0: nothing. The highest of all ranks' is what is done.
    """

    def __init__(self, trainer: Trainer, vote: Vote, asked: Callable[[], int]) -> None:
        self._trainer, self._vote, self._asked = trainer, vote, asked
        self.outcome = Highest(0, 0)
        self._before: list[tuple[Any, str, Any]] = []

    def _around(self) -> Iterator[tuple[Any, str, Agrees]]:
        """What ranks agree around: whose, its name, and how."""
        fit: Any = self._trainer.fit_loop
        epoch = fit.epoch_loop
        yield fit, "on_run_start", self._then_hold
        yield epoch, "on_run_start", self._then_hold
        yield epoch, "on_advance_end", self._hold_first
        yield epoch.val_loop, "run", self._then_hold
        yield fit, "on_advance_end", self._then_hold
        yield epoch, "_should_check_val_fx", self._by_all_clocks
        module, hook = self._trainer.lightning_module, "on_train_batch_start"
        if is_overridden(hook, module):
            yield module, hook, self._ends_the_epoch_of_all

    def install(self) -> None:
        """A stage begins."""
        self.outcome = Highest(0, 0)
        for owner, name, agrees in self._around():
            self._before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, agrees(getattr(owner, name)))

    def remove(self) -> None:
        """It has ended."""
        for owner, name, before in self._before:
            vars(owner).pop(name, None)
            if before is not None:  # somebody's own, in place of the class's
                setattr(owner, name, before)
        self._before = []

    def hold(self) -> Highest:
        """What the ranks ask for, and the last of those that do; collective."""
        ends, self.outcome = self._vote.highest(int(self._trainer.should_stop), self._asked())
        self._trainer.should_stop = bool(ends.number)
        return self.outcome

    def _then_hold(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def followed_by_vote(*args: Any) -> Any:
            result = act(*args)
            self.hold()
            return result

        return followed_by_vote

    def _hold_first(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def preceded_by_vote(*args: Any) -> Any:
            self.hold()
            return act(*args)

        return preceded_by_vote

    def _by_all_clocks(self, is_due: Callable[..., bool]) -> Callable[..., bool]:
        """With ``val_check_interval`` as a time, ranks' clocks differ: the first one that is due counts for all."""

        def is_due_somewhere(*args: Any) -> bool:
            due = is_due(*args)
            if getattr(self._trainer, "_val_check_time_interval", None) is None:
                return due
            return bool(self._vote.highest(int(due))[0].number)

        return is_due_somewhere

    def _ends_the_epoch_of_all(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """-1 of one rank would leave the others in a step without it."""

        def answered_by_all(*args: Any) -> Any:
            answer = act(*args)
            return -1 if self._vote.highest(int(answer == -1))[0].number else answer

        return answered_by_all
