"""One small number of every rank, the highest of which all ranks learn: over the host's network, at every step."""

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

    def highest(self, number: int) -> Highest:
        """The highest of all ranks' numbers (not negative); collective.

        Raises:
            RuntimeError: a rank has gone.
        """
        if self._host.size == 1:
            return Highest(number, self._host.rank)
        ballot = torch.tensor(number * self._host.size + self._host.rank)
        with TRAINING.inside("vote", self._host, ballot):
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._host.group)
        return Highest(*divmod(int(ballot), self._host.size))
