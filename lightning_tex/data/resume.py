"""Where training stands, and whether a checkpoint's position means the same samples here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_tex.parallel.errors import UserValueError


@dataclass
class Cursor:
    """Where training stands: the epoch and the micro-steps of it that have been *consumed*, not merely fetched.

    Args:
        steps_done: returns a count that grows by one with every finished training step.
        steps_per_epoch: returns the micro-steps of an epoch, or infinity while that is unknown.
        epoch: to begin with.
        batch: micro-steps of that epoch to skip.
    """

    steps_done: Callable[[], int]
    steps_per_epoch: Callable[[], float]
    epoch: int = 0
    batch: int = 0
    _origin: int | None = None  # steps_done when the present iteration's first batch was asked for
    _end: float = float("inf")  # micro-steps of the present epoch, once the data has run out

    def position(self) -> tuple[int, int]:
        """The next micro-step to train on, as (epoch, micro-step in it)."""
        batch, length = self.batch + self._steps(), min(self.steps_per_epoch(), self._end)
        if batch == 0 or batch < length:
            return self.epoch, batch
        epochs, batch = divmod(batch, int(length))
        return self.epoch + epochs, batch

    def begin(self) -> tuple[int, int]:
        """Called when the first batch of an iteration is asked for; returns the micro-step to start at."""
        return self._start(*self.position())

    def run_out(self, batch: int) -> None:
        """Called when the data of the present epoch has run out after its micro-step ``batch - 1``."""
        self._end = batch

    def _start(self, epoch: int, batch: int) -> tuple[int, int]:
        self.epoch, self.batch, self._origin, self._end = epoch, batch, self.steps_done(), float("inf")
        return epoch, batch

    def period(self) -> int | None:
        """Micro-steps after which an iteration goes on with the next epoch; None: it ends with its epoch."""
        length = self.steps_per_epoch()
        return None if length == float("inf") else int(length)

    def _steps(self) -> int:
        return 0 if self._origin is None else self.steps_done() - self._origin


@dataclass
class SamplerCursor(Cursor):
    """The cursor of a loop without a Trainer: every iteration reads the epoch that ``set_epoch`` selected.

    Args:
        order: what is iterated, with ``epoch`` and ``start``.
    """

    order: Any = None

    def begin(self) -> tuple[int, int]:
        """As :meth:`Cursor.begin`, with the epoch left to the caller's ``set_epoch``."""
        return self._start(self.order.epoch, self.order.start)

    def period(self) -> None:
        """An iteration ends with its epoch."""
        return None


def trainer_cursor(trainer: Any, epoch: int, batch: int) -> Cursor:
    """A cursor that reads from a Lightning Trainer's loops how many micro-steps are done."""
    return Cursor(functools.partial(steps_done, trainer), lambda: trainer.num_training_batches, epoch, batch)


class Positions:
    """What is to be known of a position before each micro-step that has been fetched and may still be gone back to.

    Args:
        step: a micro-step.
        state: before it.
    """

    def __init__(self, step: int, state: Any) -> None:
        self._before = {step: state}

    def has(self, step: int) -> bool:
        """Whether a micro-step is one of them."""
        return step in self._before

    def before(self, step: int) -> Any:
        """The state before a micro-step."""
        return self._before[step]

    def add(self, step: int, state: Any, done: int) -> None:
        """One more micro-step that has been fetched, where ``done`` have been trained on."""
        self._before[step] = state
        for old in [old for old in self._before if old < done]:
            del self._before[old]


def steps_done(trainer: Any) -> int:
    """Micro-steps that a Trainer has finished, of all its fits."""
    # `total` also survives a restart; `current` is reset late, and `fetched` runs ahead of what was trained on.
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def check_tokenizer(state: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises ``ValueError`` if a checkpoint's token ids mean other text than here."""
    before, now = state["tokenizer_fingerprint"], mine["tokenizer_fingerprint"]
    if before != now:
        raise UserValueError(
            f"the tokenizer has changed: fingerprint {now}, in the checkpoint {before}; "
            "give the checkpoint's as tokenizer=..., since token ids would mean other text"
        )


def check_same(state: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises ``ValueError`` if a checkpoint's position means other samples than here.

    Args:
        state: of the data module, from the checkpoint.
        mine: what this run has under the same keys.
    """
    check_tokenizer(state, mine)
    for option in ("sequence_length", "seed"):
        if state[option] != mine[option]:
            raise UserValueError(
                f"{option}={mine[option]} but the checkpoint was trained with {option}={state[option]}; "
                "only the latter continues with the next sample"
            )
    before, now = state["dataset_fingerprint"], mine["dataset_fingerprint"]
    if before != now:
        raise UserValueError(
            f"the data set has changed: fingerprint {now}, in the checkpoint {before}; "
            "resume with the checkpoint's data, or start a new run from its weights"
        )
    if state["samples"] and state["global_batch_size"] != mine["global_batch_size"]:
        raise UserValueError(
            f"global_batch_size={mine['global_batch_size']} but the checkpoint stands {state['samples']} samples into "
            f"an epoch of global_batch_size={state['global_batch_size']}; change it at an epoch's end only"
        )
