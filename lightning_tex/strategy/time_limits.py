"""How long a fit may still run: until a limit of the Trainer's, or the end of a SLURM job."""

from __future__ import annotations

import os
import time
from time import monotonic

from lightning import Trainer
from lightning.pytorch.callbacks import Timer

# Left of SLURM's end time when the run stops, besides what a step and a save take.
_BEFORE_THE_END = 30.0  # s


class TimeLimits:
    """``Trainer(max_time=)`` and SLURM's end time of one fit: near when a step and a save would pass them.

    Args:
        trainer: whose fit it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdigit() else None
        self._step_began = self._asked = monotonic()
        self._step = self._save = 0.0
        self.reached = False

    def step_begins(self) -> None:
        """The first batch of an optimizer step begins."""
        self._step_began = monotonic()

    def batch_ended(self) -> None:
        """A batch is done, the last one of a step or not."""
        self._step = monotonic() - self._step_began

    def save_took(self, seconds: float) -> None:
        """A save, in seconds."""
        self._save = seconds

    def near(self) -> bool:
        """Whether a save might end too late if it waits for the next time that this is asked.

        Until then it may be as long as the last step took, or as it was since this was asked last. Never before the
        run's first step.
        """
        now = monotonic()
        since, self._asked = now - self._asked, now
        if self.reached or not self._step or not self._trainer.fit_loop._can_stop_early:
            return False
        needed = max(self._step, since) + 1.5 * self._save
        if self._end is not None and self._end - time.time() < needed + _BEFORE_THE_END:
            return True
        timers = [c for c in self._trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        left = [timer.time_remaining() for timer in timers]
        return any(seconds is not None and seconds < needed for seconds in left)
