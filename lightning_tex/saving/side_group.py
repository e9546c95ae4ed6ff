"""All ranks as a group of their own for a thread beside training, whose collectives must not mix with training's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_tex.topology import Axis


class SideGroup:
    """Objects between all ranks over the host's network; collective to make.

    Args:
        world: all ranks.
        timeout: how long a rank may take to write its files.
    """

    def __init__(self, world: Axis, timeout: timedelta = timedelta(hours=2)) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, ``None`` elsewhere."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self._world.size if self._world.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]
