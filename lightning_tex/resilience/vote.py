"""A few small numbers of every rank, of each of which all learn the highest: over the host's network, at every step."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.topology import Axis
from lightning_tex.resilience.star import Star


class Highest(NamedTuple):
    """The highest number, and the last of the ranks that gave it."""

    number: int
    rank: int


class Vote:
    """Votes of all ranks.

    Args:
        host: all ranks over the host's network, so that no device is waited for.
        star: their connections to the first one; ``None``: they have none, and gloo has to do.
    """

    def __init__(self, host: Axis, star: Star | None) -> None:
        self._host, self._star = host, star

    def highest(self, *numbers: int) -> list[Highest]:
        """Of each number (not negative) the highest of all ranks'; collective, 8 bytes for each.

        Raises:
            RuntimeError: a rank has gone.
        """
        world, rank = self._host.size, self._host.rank
        if world == 1:
            return [Highest(number, rank) for number in numbers]
        given = [number * world + rank for number in numbers]
        with TRAINING.inside("vote", self._host, _like(len(numbers))):
            highest = self._by_gloo(given) if self._star is None else self._star.highest(given)
        return [Highest(*divmod(each, world)) for each in highest]

    def _by_gloo(self, given: list[int]) -> list[int]:
        ballot = torch.tensor(given, device="cpu")
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._host.group)
        return ballot.tolist()


@cache
def _like(count: int) -> Tensor:
    """What the flight record tells a vote's size by."""
    return torch.empty(count, dtype=torch.int64, device="cpu")
