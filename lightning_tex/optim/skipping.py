"""Steps that are not taken because a gradient or loss is infinite or NaN: who decides, and when the host learns of it.

On CPU the host looks at once. On a GPU the step's own kernel leaves the step out where the device has seen an infinity,
and the host, which does not wait, learns of it at the next step: when that is handed to the device, this one is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.host_copy import HostCopy


@dataclass
class Skipped:
    """Steps not taken because a gradient was infinite or NaN: since training was set up, and the last ones in a row."""

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """One more step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def after(self, skipped: bool) -> Skipped:
        """What this is after one more step."""
        counted = Skipped(self.total, self.in_a_row)
        counted.count(skipped)
        return counted


class StepWatcher(Protocol):
    """Who is told of steps that are not taken, and decides when that happened too often."""

    def note(self) -> Any:
        """What is to be known of the step that is about to be taken or left out, should that be asked for later."""

    def skipped(self, note: Any, gradients_are_there: bool) -> None:
        """A step was left out; called on all ranks.

        Args:
            note: of that step.
            gradients_are_there: or those of the next one are in their place.
        """


class _Undecided(NamedTuple):
    """A step that is left to the device to take.

    Args:
        fate: two numbers, 1 where it is not taken and 1 where that is excused.
        note: of the watcher.
    """

    fate: HostCopy
    note: Any

    def is_left_out(self) -> bool:
        return bool(self.fate.numbers()[0])

    def is_excused(self) -> bool:
        return bool(self.fate.numbers()[1])


class StepGuard:
    """Counts steps that are not taken.

    Args:
        most: so many in a row are too many; ``None``: any number is not.
        culprit: a parameter whose gradient is not finite, in words, while the gradients are there; collective.

    Attributes:
        known: as far as the host knows.
        watcher: is told, and decides what happens when it is too many; without one that is an error.
        excused: of the next step, 1 where its being left out is no reason to end: a loss scale has only to fall.
    """

    def __init__(self, most: int | None, culprit: Callable[[], str]) -> None:
        self._most, self._culprit = most, culprit
        self.known = Skipped()
        self.watcher: StepWatcher | None = None
        self.excused: Tensor | None = None
        self._undecided: _Undecided | None = None

    def all(self) -> Skipped:
        """The last step included; waits for the device to have taken it or not."""
        return self.known if self._undecided is None else self.known.after(self._undecided.is_left_out())

    def taken(self) -> None:
        """The step is taken."""
        self.known.count(False)

    def left_out(self) -> None:
        """The step is not taken, its gradients are there; collective.

        Raises:
            RuntimeError: too many in a row, and there is no watcher.
        """
        if self.excused is not None and bool(self.excused):
            self.known.total += 1
        else:
            self._left_out(self._note(), gradients_are_there=True)

    def undecided(self, left_out: Tensor) -> None:
        """The device has the step, and leaves it out where this is 1."""
        excused = torch.zeros_like(left_out) if self.excused is None else self.excused.to(left_out.dtype)
        self._undecided = _Undecided(HostCopy(torch.stack([left_out, excused.view_as(left_out)])), self._note())

    def learn(self) -> bool:
        """Learn what became of the last step, and wait for that one only; collective.

        Returns:
            whether it was one too many, so that no further one is to be taken.

        Raises:
            RuntimeError: it was, and there is no watcher.
        """
        undecided, self._undecided = self._undecided, None
        if undecided is None:
            return False
        if not undecided.is_left_out():
            self.taken()
            return False
        if undecided.is_excused():
            self.known.total += 1
            return False
        self._left_out(undecided.note, gradients_are_there=False)
        return self._too_many

    @property
    def _too_many(self) -> bool:
        return self._most is not None and self.known.in_a_row >= self._most

    def _note(self) -> Any:
        return None if self.watcher is None else self.watcher.note()

    def _left_out(self, note: Any, gradients_are_there: bool) -> None:
        self.known.count(True)
        if self.watcher is not None:
            self.watcher.skipped(note, gradients_are_there)
        elif self._too_many:
            what = f"the gradient of {self._culprit()}" if gradients_are_there else "a gradient of the last step"
            raise UserRuntimeError(
                f"{what} is infinite or NaN, and some gradient was in each of "
                f"the last {self._most} steps, none of which was taken; look at the data and the learning rate of the "
                "steps before. Legal: TexMoEStrategy(max_skipped_steps=..), None to take such steps"
            )
