"""Shards tile the tensor, and a sharded model gathers to what it was."""

import copy

import pytest
import torch
from helpers.cases import case
from helpers.sharded_modules import LAYOUTS, Everything, box_of, coordinates
from helpers.topologies import join
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_tex.layers import ColumnParallelLinear
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import (
    check_shardable,
    parameter_shardings,
    shard_module,
    synchronise,
)
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks


@st.composite
def sharded_tensors(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dims = draw(st.permutations(range(len(shape))))
    shard_dims = [(dim, draw(st.integers(1, 5))) for dim in dims[: draw(st.integers(1, len(shape)))]]
    return shape, shard_dims


@given(sharded_tensors())
def test_boxes_tile_the_tensor_and_sharding_round_trips(case):
    shape, shard_sizes = case
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    rebuilt, covered = torch.zeros(shape), torch.zeros(shape)
    for ranks in coordinates(shard_sizes):
        box = box_of(shape, [(dim, size, rank) for (dim, size), rank in zip(shard_sizes, ranks, strict=True)])
        stored = box.shard(whole)
        assert stored.shape == box.stored
        assert stored.sum() == box.unpadded(stored).sum()  # the padding is zero
        rebuilt[box.extent.slices] = box.unpadded(stored)
        covered[box.extent.slices] += 1
    assert torch.equal(rebuilt, whole)
    assert torch.equal(covered, torch.ones(shape))


def test_box_of_a_padded_shard_by_hand():
    boxes = [box_of((5, 3), [(0, 4, rank)]) for rank in range(4)]
    assert [b.stored for b in boxes] == [(2, 3)] * 4
    assert [b.extent.offsets[0] for b in boxes] == [0, 2, 4, 5]
    assert [b.extent.sizes[0] for b in boxes] == [2, 2, 1, 0]
    assert boxes[2].shard(torch.arange(15).view(5, 3)).tolist() == [[12, 13, 14], [0, 0, 0]]


def sharded_on_ranks():
    torch.manual_seed(0)
    original = Everything()
    wholes = dict(original.named_parameters())
    for layout in LAYOUTS:
        with case(layout):
            topology = join(*layout)
            model = copy.deepcopy(original)
            check_shardable(model, topology.layout)
            shard_module(model, topology)
            stored = {name: p.clone() for name, p in model.named_parameters()}
            shard_module(model, topology)
            assert model.head.weight is model.embedding.weight
            found = parameter_shardings(model, topology)
            assert list(found) == list(wholes)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, stored[name]), f"{name} is sharded twice"
                assert parameter.shape == found[name].box.stored
                assert torch.equal(found[name].gather(parameter.detach()), wholes[name]), name
                expert = ".experts." in name
                assert found[name].replicas is (topology.expert_data if expert else topology.data)
                assert found[name].divisor == topology.data.size
    torch.distributed.barrier()
    return True


def test_a_model_sharded_on_four_ranks_gathers_to_what_it_was():
    run_ranks(4, sharded_on_ranks)


def count_over_world():
    counted = []
    for layout in LAYOUTS:
        with case(layout):
            topology = join(*layout)
            model = Everything()
            shard_module(model, topology)
            found = parameter_shardings(model, topology)
            for name, parameter in model.named_parameters():
                at = found[name]
                elements = at.box.unpadded(parameter).numel() if at.counted and at.replicas.rank == 0 else 0
                total = torch.tensor(elements)
                torch.distributed.all_reduce(total)
                assert total == torch.Size(at.box.full).numel(), (layout, name)
                counted.append(name)
    return len(counted)


def test_counted_copies_hold_every_element_exactly_once():
    assert run_ranks(4, count_over_world)[0] > 100


def test_a_model_sharded_for_one_layout_is_not_sharded_for_another():
    model = nn.Sequential(ColumnParallelLinear(4, 8))
    shard_module(model, Topology.single())
    check_shardable(model, Layout(1))
    with pytest.raises(ValueError, match=r"0 is already sharded for another layout .* asked for: 4 ranks = tensor 2"):
        check_shardable(model, Layout(4, 2, 1, 2))


def synchronise_on_ranks():
    topology = join()
    torch.manual_seed(topology.world.rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), ColumnParallelLinear(4, 8), nn.Linear(99, 200))
    model[1].running_mean.normal_()
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), ColumnParallelLinear(4, 8), nn.Linear(99, 200))
    first[1].running_mean.normal_()
    synchronise(model, topology.world, torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name


def test_synchronise_gives_every_rank_the_first_ones_weights_and_buffers():
    run_ranks(4, synchronise_on_ranks)
