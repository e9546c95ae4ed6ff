"""One small number of every rank, the highest of which all ranks learn: over the host's network, at every step."""

from __future__ import annotations

from datetime import timedelta
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
    """All ranks as a group over the host's network, so that no device is waited for; collective to make.

    Args:
        world: all ranks.
        timeout: how long ranks may be apart.
    """

    def __init__(self, world: Axis, timeout: timedelta | None) -> None:
        self._world = world
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            on_host = dist.get_backend() in ("gloo", "fake")  # a trace's, whose collectives move nothing
            self._group = dist.group.WORLD if on_host else dist.new_group(backend="gloo", timeout=timeout)

    def highest(self, number: int) -> Highest:
        """The highest of all ranks' numbers (not negative); collective.

        Raises:
            RuntimeError: a rank has gone.
        """
        if self._group is None:
            return Highest(number, self._world.rank)
        ballot = torch.tensor(number * self._world.size + self._world.rank)
        with TRAINING.inside("vote", self._world, ballot):
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group)
        return Highest(*divmod(int(ballot), self._world.size))
