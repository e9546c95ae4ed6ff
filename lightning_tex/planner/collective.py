"""A collective of a step as the planner has it: one description serves bytes and time."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from lightning_tex.parallel.byte_meter import Sent

# Passes of a micro-step; the optimizer's own is the step's.
FORWARD, RECOMPUTED, BACKWARD, OPTIMIZER = "forward", "recompute", "backward", "optimizer"


class Collective(NamedTuple):
    """A collective that happens ``times`` times in a pass.

    Args:
        operation: what is done.
        axis, size: over which axis, and its ranks.
        during: the pass.
        whole_bytes: of the whole tensor: what an all-reduce sums, an all-gather gives, a reduce-scatter takes, and what
            a rank gives to an all-to-all, its own part included.
        times: how often.
        counted_as: its name in the byte meter; empty: the operation.
    """

    operation: str
    axis: str
    size: int
    during: str
    whole_bytes: int
    times: int = 1
    counted_as: str = ""

    @property
    def sent_bytes(self) -> Fraction:
        """Bytes that a rank sends, each time, by ring costs."""
        return ring(self.operation, self.size, self.whole_bytes)

    @property
    def key(self) -> Sent:
        return Sent(self.counted_as or self.operation, self.axis, self.during)


def ring(operation: str, ranks: int, whole_bytes: int) -> Fraction:
    """Bytes that a rank sends: (n-1)/n of the whole, twice that in an all-reduce."""
    return Fraction((2 if operation == "all_reduce" else 1) * (ranks - 1) * whole_bytes, ranks)


def sent_bytes(collectives: Iterable[Collective]) -> dict[Sent, Fraction]:
    """Bytes that a rank sends, by what the byte meter tells apart."""
    total: dict[Sent, Fraction] = {}
    for each in collectives:
        total[each.key] = total.get(each.key, Fraction(0)) + each.times * each.sent_bytes
    return total
