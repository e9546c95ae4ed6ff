"""Which process groups there are: each division of the world once, the expert axis's by itself, all with a timeout."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist
from helpers.topologies import timeouts

from lightning_tex.parallel import groups
from lightning_tex.parallel.host_numbers import highest
from lightning_tex.parallel.layout import AXES, Layout
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks

NAMES = (*AXES, "world", "host", "expert_host")


def groups_of(layouts: list[Layout], timeout: timedelta):
    dist.init_process_group("gloo", timeout=timeout)
    found = []
    for layout in layouts:
        topology = Topology.build(layout, "cpu", timeout=timeout)
        groups = {name: getattr(topology, name).group for name in NAMES}
        names = {name: group.group_name for name, group in groups.items()}
        meshed = {name: topology.mesh.get_group(name).group_name for name in ("data", "tensor")}
        meshed |= {name: topology.expert_mesh.get_group(name).group_name for name in AXES[2:]}
        found.append((names, meshed, set(timeouts(groups).values())))
    return found


# The names of axes that share a group, beside the world's and the expert axis's own.
CASES = {
    Layout(4, expert=4): [
        {"data", "world", "host"},
        {"tensor", "expert_tensor", "expert_data"},
        {"expert", "expert_host"},
    ],
    Layout(4): [{"data", "expert_data", "world", "host"}, {"tensor", "expert_tensor", "expert", "expert_host"}],
    Layout(4, 2, 2, 2): [
        {"world", "host"},
        {"data"},
        {"tensor", "expert_tensor"},
        {"expert", "expert_host"},
        {"expert_data"},
    ],
    Layout(4, 4, 4, 1): [
        {"tensor", "world", "host"},
        {"data", "expert_tensor", "expert_data"},
        {"expert", "expert_host"},
    ],
}


@pytest.fixture(scope="module")
def found():
    by_rank = run_ranks(4, groups_of, list(CASES), timedelta(seconds=77))
    return [dict(zip(CASES, of_rank, strict=True)) for of_rank in by_rank]


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_divisions_that_are_equal_share_a_group_and_the_expert_axis_has_its_own(found, layout) -> None:
    for of_rank in found:
        names, meshed, _ = of_rank[layout]
        shared = [{name for name in NAMES if names[name] == group} for group in dict.fromkeys(names.values())]
        assert sorted(map(sorted, shared)) == sorted(map(sorted, CASES[layout]))
        assert meshed == {name: names[name] for name in meshed}


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_the_timeout_reaches_every_group(found, layout) -> None:
    assert all(of_rank[layout][2] == {timedelta(seconds=77)} for of_rank in found)


def agreed_on_hosts():
    """With groups that do not reach tensors on CPU, as NCCL's do not."""
    dist.init_process_group("gloo")
    numbers = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(groups, "reaches_cpu", lambda group: False)
        for layout in (Layout(4, expert=2), Layout(4, expert=2), Layout(4, expert=4), Layout(4)):
            topology = Topology.build(layout, "cpu")
            name, own = topology.expert_host.group.group_name, topology.expert.group.group_name
            assert (name == own) == (layout.expert == 1)
            assert (name == topology.host.group.group_name) == (layout.expert == 4)
            numbers.append((name, highest(dist.get_rank(), topology.expert_host)))
    return numbers


def test_an_expert_axis_whose_group_does_not_reach_hosts_has_one_that_does_once() -> None:
    found = run_ranks(4, agreed_on_hosts)
    assert [[highest for _, highest in numbers] for numbers in found] == [
        [1, 1, 3, 0], [1, 1, 3, 1], [3, 3, 3, 2], [3, 3, 3, 3]
    ]  # fmt: skip
    assert all(numbers[0][0] == numbers[1][0] for numbers in found)
