"""Plans without activations, and why."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_tex.planner.instants import Instant
from lightning_tex.planner.layouts import ActivationSource, Candidate, Job


class StatesOnly(ActivationSource):
    """Nothing is known of what forwards keep for backwards.

    Args:
        reason: why.
    """

    name = "states only"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def instants(self, job: Job, candidate: Candidate, device: str) -> Iterator[Instant]:
        """None."""
        return iter(())
