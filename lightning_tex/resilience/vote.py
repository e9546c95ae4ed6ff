"""A few small numbers of every rank, of each of which all learn the highest: over the host's network, at every step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.topology import Axis


class Highest(NamedTuple):
    """The highest number, and the last of the ranks that gave it."""

    number: int
    rank: int


class Vote:
    """Votes of all ranks.

    Args:
        host: all ranks over the host's network, so that no device is waited for.
    """

    def __init__(self, host: Axis) -> None:
        self._host = host

    def highest(self, *numbers: int) -> list[Highest]:
        """Of each number (not negative) the highest of all ranks'; one collective of 8 bytes for each.

        Raises:
            RuntimeError: a rank has gone.
        """
        world, rank = self._host.size, self._host.rank
        if world == 1:
            return [Highest(number, rank) for number in numbers]
        ballot = torch.tensor([number * world + rank for number in numbers])
        with TRAINING.inside("vote", self._host, ballot):
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._host.group)
        return [Highest(*divmod(highest, world)) for highest in ballot.tolist()]
