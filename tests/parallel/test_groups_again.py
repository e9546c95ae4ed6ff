"""Process groups are made once in a world, and anew in the next one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from lightning_tex.parallel.layout import AXES, Layout
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks


def build_again(rendezvous: Path) -> tuple[list[bool], int, int, bool, float]:
    """Whether a second topology has the groups of the first, groups before and after it, whether one with another
    timeout has that of an axis of one rank; and, in a second world, the sum over its expert axis.
    """

    def build(timeout: timedelta | None = None) -> Topology:
        return Topology.build(Layout(2, tensor=1, expert=2), "cpu", timeout=timeout)

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    first = build()
    groups = len(_world.pg_map)
    second = build()
    groups_later, other = len(_world.pg_map), build(timedelta(seconds=20))
    same = [second.axis(name).group is first.axis(name).group for name in AXES]
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    total = torch.ones(())
    dist.all_reduce(total, group=build().expert.group)
    return same, groups, groups_later, other.tensor.group is first.tensor.group, float(total)


def test_a_second_topology_takes_the_groups_that_are_there(tmp_path: Path) -> None:
    for same, groups, groups_later, with_another_timeout, total in run_ranks(2, build_again, tmp_path / "rendezvous"):
        assert all(same) and groups == groups_later and not with_another_timeout
        assert total == 2.0
