"""All ranks as a group of their own for a thread beside training, whose collectives must not mix with training's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.flight_record import SAVING
from lightning_tex.parallel.topology import Axis


class SideGroup:
    """Objects between all ranks over the host's network; collective to make.

    Args:
        world: all ranks.
        timeout: how long the others may wait for a rank that writes its files.
    """

    def __init__(self, world: Axis, timeout: timedelta) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, ``None`` elsewhere.

        Raises:
            RuntimeError: a rank has gone.
        """
        if self._world.size == 1:
            return [value]
        values: list[Any] | None = [None] * self._world.size if self._world.rank == 0 else None
        with self._closed_on_error() as group:
            SAVING.enter("gather of an object", self._world)
            dist.gather_object(value, values, dst=0, group=group)
            SAVING.leave()
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value.

        Raises:
            RuntimeError: a rank has gone.
        """
        if self._world.size == 1:
            return value
        values = [value]
        with self._closed_on_error() as group:
            SAVING.enter("broadcast of an object", self._world)
            dist.broadcast_object_list(values, src=0, group=group)
            SAVING.leave()
        return values[0]

    @contextmanager
    def _closed_on_error(self) -> Iterator[dist.ProcessGroup]:
        """Pass a failure on: ranks that wait for this one, not for the one that has gone, would wait for ever."""
        if self._group is None:
            raise UserRuntimeError("another rank has gone, so nothing can be saved any more")
        try:
            yield self._group
        except Exception:
            dist.destroy_process_group(self._group)
            self._group = None
            raise
