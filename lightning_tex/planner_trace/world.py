"""A world of many ranks in one process: this process is one of them, and its collectives move nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_tex.parallel.errors import UserRuntimeError, UserValueError


class OneOfMany(ClusterEnvironment):
    """Lightning's view of such a world: one node, whose processes somebody else has started.

    Args:
        rank: the rank that this process plays.
        world_size: ranks in all.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank, self._world_size = rank, world_size

    def described(self) -> dict[str, Any]:
        """As a recipe names it."""
        options = {"rank": self._rank, "world_size": self._world_size}
        return {"class_path": f"{type(self).__module__}.{type(self).__name__}", "init_args": options}

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "localhost"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Nothing: it is known."""

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it is known."""

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0


@contextmanager
def one_of_many(rank: int, world_size: int) -> Iterator[OneOfMany]:
    """torch's fake process group, for as long as one is inside.

    Args:
        rank: the rank that this process plays.
        world_size: ranks in all.

    Raises:
        ValueError: a rank that the world does not have.
        RuntimeError: the process belongs to a real world.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserValueError(f"rank={rank} of a world of {world_size} ranks; legal: 0 to world_size - 1")
    if dist.is_initialized():
        raise UserRuntimeError("a trace needs a process of its own: this one has joined a process group already")
    before = getattr(rank_zero_only, "rank", None), getattr(utilities_rank_zero_only, "rank", None)
    level, environment = dist.get_debug_level(), dict(os.environ)
    dist.set_debug_level(dist.DebugLevel.OFF)  # or torch would have gloo check collectives that move nothing
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield OneOfMany(rank, world_size)
    finally:
        dist.destroy_process_group()
        dist.set_debug_level(level)
        os.environ.clear()
        os.environ.update(environment)
        rank_zero_only.rank, utilities_rank_zero_only.rank = before  # type: ignore[attr-defined]
