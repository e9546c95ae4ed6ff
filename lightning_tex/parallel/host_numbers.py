"""Numbers that hosts know and ranks agree on: over the hosts' network, so that no device is waited for."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import count_sent
from lightning_tex.parallel.topology import Axis


def highest(number: int, host: Axis) -> int:
    """The highest of the numbers that the ranks of an axis give. Collective.

    Args:
        number: this rank's.
        host: the axis over the hosts' network.
    """
    if host.size == 1:
        return number
    ballot = np.array([number])
    on_host = torch.from_numpy(ballot)
    with TRAINING.inside("all_reduce", host, on_host):
        dist.all_reduce(on_host, op=dist.ReduceOp.MAX, group=host.group)
    count_sent("exchange_counts", host, 2 * (host.size - 1) * on_host.nbytes)
    return int(ballot[0])
