"""How long something takes, on a machine that may have other things to do.

A bound in seconds is what an idle machine is held to. A busy one gets as much more as its processes have waited for a
CPU meanwhile, and never more than as much again: what stands still does not pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

_PRESSURE = Path("/proc/pressure/cpu")


@dataclass(frozen=True)
class Elapsed:
    """A time that has passed.

    Args:
        seconds: on the clock.
        hindered: of them, those in which a process of this machine waited for a CPU; 0 where it does not say.
    """

    seconds: float
    hindered: float = 0.0

    def is_within(self, bound: float) -> bool:
        """Whether it is less than some seconds, or would have been on a machine that has nothing else to do.

        Ranks that share processors wait for each other on an idle machine, too, which is no excuse for a stall.
        """
        return self.seconds - min(self.hindered, bound) < bound


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._began, self._waited = time.monotonic(), seconds_waited_for_a_cpu()

    def elapsed(self) -> Elapsed:
        """Until now."""
        return Elapsed(time.monotonic() - self._began, seconds_waited_for_a_cpu() - self._waited)


def seconds_waited_for_a_cpu() -> float:
    """Since the machine's start, those in which some process could run and did not."""
    return float(_some("total")) / 1e6


def patience(seconds: float) -> float:
    """A limit for what is to be ended because it hangs: longer by the share of the last ten seconds in which some
    process waited for a CPU."""
    return seconds * (1 + float(_some("avg10")) / 100)


def _some(field: str) -> str:
    try:
        line = _PRESSURE.read_text().splitlines()[0]
    except OSError:
        return "0"
    return dict(entry.split("=") for entry in line.split()[1:])[field]
