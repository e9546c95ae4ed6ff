import re

import pytest
import torch.distributed as dist
from helpers.topologies import join
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tex.parallel.layout import AXES, Layout
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks

TED_16 = {
    "tensor": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)],
    "data": [(0, 2, 4, 6, 8, 10, 12, 14), (1, 3, 5, 7, 9, 11, 13, 15)],
    "expert_tensor": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)],
    "expert": [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)],
    "expert_data": [(0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15)],
}
FOLDED_16 = {
    "tensor": TED_16["tensor"],
    "data": TED_16["data"],
    "expert_tensor": [(rank,) for rank in range(16)],
    "expert": [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)],
    "expert_data": [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)],
}
TABLES = [(Layout(16, 2, 4, 2), TED_16), (Layout(16, 2, 4, 1), FOLDED_16)]


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def layouts(draw):
    world = draw(st.integers(1, 48))
    tensor = draw(st.sampled_from(divisors(world)))
    expert_tensor = draw(st.sampled_from([1, tensor]))
    expert = draw(st.sampled_from(divisors(world // expert_tensor)))
    return Layout(world, tensor, expert, expert_tensor)


# --- groups


@pytest.mark.parametrize(("layout", "table"), TABLES, ids=["ted", "folding"])
@pytest.mark.parametrize("axis", AXES)
def test_groups_are_those_of_the_design(layout, table, axis):
    assert sorted(layout.groups(axis)) == table[axis]


def build_as_each_of_16_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen = []
    for layout, table in TABLES:
        for rank in range(16):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=16)
            topology = Topology.build(layout, "cpu")
            for name in AXES:
                axis = topology.axis(name)
                (expected,) = [group for group in table[name] if rank in group]
                seen.append((axis.ranks == expected, axis.size == len(expected), expected[axis.rank] == rank))
            dist.destroy_process_group()
    return seen


def test_process_groups_of_16_ranks_are_those_of_the_design():
    (seen,) = run_ranks(1, build_as_each_of_16_ranks)
    assert len(seen) == 2 * 16 * len(AXES)
    assert all(all(ok) for ok in seen)


def gather_each_axis(cases):
    found = []
    for case in cases:
        topology = join(*case)
        for name in (*AXES, "world"):
            axis = topology.axis(name)
            members = [None] * axis.size
            dist.all_gather_object(members, dist.get_rank(), group=axis.group)
            found.append((tuple(members), axis.ranks, axis.ranks[axis.rank]))
    return found


def test_real_groups_hold_the_ranks_their_axis_says():
    results = run_ranks(4, gather_each_axis, [(2, 2, 2), (2, 2, 1), (1, 4, 1), (4, 1, 4)])
    for rank, found in enumerate(results):
        assert all(members == ranks and mine == rank for members, ranks, mine in found)


@given(layouts())
def test_axes_partition_the_world_and_equation_1_holds(layout):
    assert layout.world == layout.tensor * layout.data
    assert layout.world == layout.expert_tensor * layout.expert * layout.expert_data
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        assert {len(group) for group in groups} == {getattr(layout, axis)}
        for group in groups:
            assert [layout.coordinates(rank)[axis] for rank in group] == list(range(len(group)))


@given(layouts())
def test_two_ranks_never_share_all_coordinates_of_a_mesh(layout):
    at = [layout.coordinates(rank) for rank in range(layout.world)]
    assert len({(c["tensor"], c["data"]) for c in at}) == layout.world
    assert len({(c["expert_tensor"], c["expert"], c["expert_data"]) for c in at}) == layout.world


@given(layouts())
def test_replicas_of_an_expert_hold_the_same_shard_of_everything_else_under_ted(layout):
    if layout.expert_tensor == layout.tensor:
        for group in layout.groups("expert_data"):
            assert len({layout.coordinates(rank)["tensor"] for rank in group}) == 1


def test_single_is_a_world_of_one():
    topology = Topology.single()
    assert all((topology.axis(n).size, topology.axis(n).rank, topology.axis(n).ranks) == (1, 0, (0,)) for n in AXES)
    assert topology.axis("world").group is None


# --- sizes


@given(st.integers(1, 32), st.lists(st.integers(1, 24), min_size=1, max_size=3), st.data())
def test_auto_is_the_largest_size_that_divides_everything(world, experts, data):
    tensor = data.draw(st.sampled_from(divisors(world)))
    expert_tensor = data.draw(st.sampled_from([None, 1]))
    layout = Layout.resolve(world, tensor, "auto", expert_tensor, experts)
    share = world // (tensor if expert_tensor is None else 1)
    possible = [n for n in range(1, world + 1) if share % n == 0 and all(e % n == 0 for e in experts)]
    assert layout.expert == max(possible)
    assert Layout.legal_expert_sizes(world, layout.expert_tensor, experts) == possible


def test_auto_without_experts_is_one():
    assert Layout.resolve(8, 2).expert == 1


def test_expert_tensor_defaults_to_tensor():
    assert Layout.resolve(8, 4).expert_tensor == 4
    assert Layout.resolve(8, 4, expert_tensor_parallel_size=1).expert_tensor == 1


@settings(max_examples=200)
@given(st.integers(1, 16), st.integers(-1, 17), st.integers(-1, 17), st.integers(0, 17), st.integers(1, 12))
def test_resolve_accepts_exactly_what_is_legal(world, tensor, expert, expert_tensor, experts):
    legal = (
        tensor >= 1
        and world % tensor == 0
        and expert_tensor in (1, tensor)
        and expert >= 1
        and (world // expert_tensor) % expert == 0
        and experts % expert == 0
    )
    try:
        layout = Layout.resolve(world, tensor, expert, expert_tensor, [experts])
    except ValueError:
        assert not legal
    else:
        assert legal
        assert layout == Layout(world, tensor, expert, expert_tensor)


# --- errors

ERRORS = [
    (
        {"world": 8, "tensor_parallel_size": 3},
        "tensor_parallel_size=3 does not divide the world of 8 ranks; legal: 1, 2, 4, 8",
    ),
    (
        {"world": 8, "expert_parallel_size": 4, "num_experts": [6]},
        "num_experts=6 is not divisible by expert_parallel_size=4; "
        "legal sizes on 8 ranks with tensor_parallel_size=1: 1, 2",
    ),
    (
        {"world": 8, "tensor_parallel_size": 2, "expert_parallel_size": 8, "num_experts": [8]},
        "expert_parallel_size=8 is not possible on 8 ranks with tensor_parallel_size=2; legal sizes: 1, 2, 4",
    ),
    (
        {"world": 8, "expert_parallel_size": "all", "num_experts": [8]},
        "expert_parallel_size='all' is not possible on 8 ranks with tensor_parallel_size=1; legal sizes: 1, 2, 4, 8",
    ),
    (
        {"world": 8, "tensor_parallel_size": 4, "expert_tensor_parallel_size": 2},
        "expert_tensor_parallel_size=2 with tensor_parallel_size=4; legal: "
        "4 (experts sharded like the rest, TED) or 1 (experts whole, folding)",
    ),
    (
        {"world": 8, "tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "duplicate_token_dropping": False},
        "duplicate_token_dropping=False is not possible with expert_tensor_parallel_size=1 and tensor_parallel_size=2",
    ),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_error_gives_rule_numbers_and_legal_values(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout.resolve(**options)


def test_expert_axis_without_experts_is_refused():
    with pytest.raises(ValueError, match="expert_parallel_size=4, but the model has no MoE layer; legal: 1 or 'auto'"):
        Layout(8, 1, 4).require_experts([])
    Layout(8, 1, 4).require_experts([8])
    Layout(8).require_experts([])


def test_not_splitting_is_legal_where_experts_are_sharded_like_the_rest():
    assert Layout.resolve(8, 2, 2, 2, [4], duplicate_token_dropping=False) == Layout(8, 2, 2, 2)
