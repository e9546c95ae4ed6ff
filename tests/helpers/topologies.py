"""Topologies for tests that run layers on forked ranks without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.topology import Topology


def timeouts(groups: Mapping[str, dist.ProcessGroup]) -> dict[str, timedelta]:
    """Of groups, by name, as their backends have them."""
    return {name: group._get_backend(group._device_types[0]).options._timeout for name, group in groups.items()}


@cache
def join(
    tensor: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    duplicate_token_dropping: bool = True,
    **communication: bool | int,
) -> Topology:
    """This rank's topology over the whole world; makes the world on the first call. Collective."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    layout = Layout.resolve(
        dist.get_world_size(), tensor, expert, expert_tensor, duplicate_token_dropping=duplicate_token_dropping
    )
    return Topology.build(layout, "cpu", communication=Communication(duplicate_token_dropping, **communication))  # type: ignore[arg-type]
