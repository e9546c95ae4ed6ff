"""When a loss is a spike: a rule over the last losses, which every rank applies to the same numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import isfinite, sqrt

from lightning_tex.parallel.errors import UserValueError


@dataclass(frozen=True)
class SpikeRule:
    """A loss, averaged over data ranks and micro-batches, is a spike if it exceeds the mean of the last ones by more
    than ``deviations`` of their standard deviation and by more than ``relative`` of their mean.

    A spike does not enter the mean, but after ``patience`` in a row the level is taken for the new one.

    Args:
        window: how many losses, of the last steps that were no spikes and finite.
        least: of how many the mean is known well enough; before, nothing is a spike.
        deviations: in standard deviations.
        relative: a share of the mean, so that the rounding of a flat loss is no spike.
        patience: spikes in a row after which all losses before are forgotten.

    Raises:
        ValueError: a number that is not legal.
    """

    window: int = 50
    least: int = 20
    deviations: float = 6.0
    relative: float = 0.1
    patience: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.least <= self.window:
            raise UserValueError(f"SpikeRule(least={self.least}, window={self.window}); legal: 2 <= least <= window")
        if self.deviations <= 0 or self.relative < 0 or self.patience < 1:
            raise UserValueError(
                f"SpikeRule(deviations={self.deviations}, relative={self.relative}, patience={self.patience}); legal: "
                "deviations above 0, relative of at least 0, patience of at least 1"
            )


class SpikeDetector:
    """Applies a rule to one loss after the other.

    Args:
        rule: when a loss is a spike.
    """

    def __init__(self, rule: SpikeRule) -> None:
        self.rule = rule
        self._losses: deque[float] = deque(maxlen=rule.window)
        self._in_a_row = 0

    def forget(self) -> None:
        """The losses to come have nothing to do with those before."""
        self._losses.clear()
        self._in_a_row = 0

    def limit(self) -> float | None:
        """Above which a loss is a spike; ``None``: too few are known."""
        known = len(self._losses)
        if known < self.rule.least:
            return None
        mean = sum(self._losses) / known
        deviation = sqrt(sum((loss - mean) ** 2 for loss in self._losses) / known)
        return mean + max(self.rule.deviations * deviation, self.rule.relative * abs(mean))

    def is_spike(self, loss: float) -> bool:
        """Whether the next loss is one. One that is not finite is none: whoever looks for those decides."""
        limit = self.limit()
        if not isfinite(loss):
            return False
        if limit is None or loss <= limit:
            self._losses.append(loss)
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        if self._in_a_row >= self.rule.patience:
            self.forget()
        return True
