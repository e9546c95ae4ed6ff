"""The process groups of a layout: each division of the world once, the expert axis's by itself, one for the host.

A communicator does one thing after the other. Were the expert axis's the data axis's or the world's, as it would be on
one node with an expert axis of all ranks, its all-to-alls would wait for the reduce-scatters of gradients.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

Division = tuple[tuple[int, ...], ...]


class ProcessGroups:
    """This rank's groups, made when they are first asked for; collective: all ranks ask for the same in one order.

    Args:
        world: number of ranks.
        timeout: of collectives; ``None``: torch's.
    """

    def __init__(self, world: int, timeout: timedelta | None) -> None:
        self._timeout = timeout
        self._made: dict[Division, dist.ProcessGroup] = {_key([tuple(range(world))]): _whole()}
        self._by_themselves: dict[tuple[str, Division], dist.ProcessGroup] = {}
        self._host: dist.ProcessGroup | None = None
        self._on_host: dict[Division, dist.ProcessGroup] = {}

    def knows(self, division: list[tuple[int, ...]], group: dist.ProcessGroup) -> None:
        """There is a group already for this rank's part of a division."""
        self._made.setdefault(_key(division), group)

    def of(self, division: list[tuple[int, ...]], name: str, by_itself: bool = False) -> dist.ProcessGroup:
        """The group of this rank's part of the world.

        Args:
            division: all parts, of ranks in ascending order.
            name: of the axis.
            by_itself: one that no other axis shares, and whose kernels go before those of others; on parts of one rank
                there is nothing to wait for, so they share theirs.
        """
        key = _key(division)
        if by_itself and len(division[0]) > 1:
            if (name, key) not in self._by_themselves:
                self._by_themselves[name, key] = self._make(division, name, _options(self._timeout, high_priority=True))
            return self._by_themselves[name, key]
        if key not in self._made:
            self._made[key] = self._make(division, name, _options(self._timeout, high_priority=False))
        return self._made[key]

    def host(self) -> dist.ProcessGroup:
        """All ranks over the host's network, for tensors on CPU: nobody waits for a device."""
        if self._host is None:
            on_cpu = reaches_cpu(_whole())
            self._host = (
                _whole() if on_cpu else dist.new_group(backend="gloo", timeout=self._timeout, group_desc="host")
            )
        return self._host

    def on_host(
        self, division: list[tuple[int, ...]], group: dist.ProcessGroup | None, name: str
    ) -> dist.ProcessGroup | None:
        """An axis's group over the host's network: its own where that reaches tensors on CPU.

        Args:
            division: all parts, of ranks in ascending order.
            group: the axis's, of this rank's part.
            name: of the axis.
        """
        if len(division[0]) == 1 or reaches_cpu(group):
            return group
        if len(division) == 1:
            return self.host()
        key = _key(division)
        if key not in self._on_host:
            for part in division:
                made = dist.new_group(list(part), backend="gloo", timeout=self._timeout, group_desc=f"{name} on hosts")
                if dist.get_rank() in part:
                    self._on_host[key] = made
        return self._on_host[key]

    def _make(self, division: list[tuple[int, ...]], name: str, options: Any) -> dist.ProcessGroup:
        own = None
        if options is not None and _whole().bound_device_id is not None:
            # One call splits the world's communicator, whatever the number of parts.
            parts = [list(part) for part in division]
            own = dist.split_group(split_ranks=parts, timeout=self._timeout, pg_options=options, group_desc=name)
            assert own is not None
            return own
        for part in division:
            group = dist.new_group(list(part), timeout=self._timeout, pg_options=options, group_desc=name)
            own = group if dist.get_rank() in part else own
        assert own is not None
        return own


# Of one world, by their timeout.
_of_world: dict[tuple[dist.ProcessGroup, timedelta | None], ProcessGroups] = {}


def groups_of_world(timeout: timedelta | None) -> ProcessGroups:
    """The groups of the world that there is: every later Trainer of the same processes takes those of the first.

    Groups last as long as the world does, and each has threads that wake a hundred times a second (gloo), or a
    communicator with buffers on the GPU (NCCL).

    Args:
        timeout: of collectives; ``None``: torch's.
    """
    world = _whole()
    if any(earlier is not world for earlier, _ in _of_world):
        _of_world.clear()
    if (world, timeout) not in _of_world:
        _of_world[world, timeout] = ProcessGroups(dist.get_world_size(), timeout)
    return _of_world[world, timeout]


def reaches_cpu(group: dist.ProcessGroup | None) -> bool:
    """Whether a group's collectives take tensors on CPU; NCCL's do not."""
    return "cpu:" in str(dist.get_backend_config(group))


def _whole() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _options(timeout: timedelta | None, high_priority: bool) -> Any:
    """NCCL's; other backends have no priorities."""
    if "nccl" not in str(dist.get_backend_config(_whole())):
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=high_priority)
    if timeout is not None:
        options._timeout = timeout
    return options


def _key(division: list[tuple[int, ...]]) -> Division:
    return tuple(sorted(division))
