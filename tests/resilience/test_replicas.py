"""The digest of a tensor, and which tensors of a module are copies."""

from __future__ import annotations

import pytest
import torch
from helpers.normed_attention import Declared, HeadNorms, NormedDecoder
from helpers.topologies import join

from lightning_tex.optim import TiledOptimizer
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.parallel.topology import Topology
from lightning_tex.resilience.replicas import Difference, describe_difference, differing, digests
from lightning_tex.strategy.replica_checks import copies
from lightning_tex.testing.ranks import run_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_depends_on_every_element_and_its_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (3, 50), dtype=torch.int64).to(dtype)
    seen = {int(digests([tensor]))}
    for place in range(150):
        changed = tensor.clone().view(-1)
        changed[place] = 1 - changed[place].to(torch.int64)
        seen.add(int(digests([changed])))
    assert len(seen) == 151
    assert int(digests([tensor])) == int(digests([tensor.clone()]))
    assert int(digests([tensor])) != int(digests([tensor.roll(1, 1)]))


def test_a_digest_goes_on_over_parts_of_a_long_tensor() -> None:
    tensor = torch.zeros((1 << 20) + 5)
    before = int(digests([tensor]))
    tensor[-1] = 1.0
    behind = int(digests([tensor]))
    tensor[-1], tensor[4] = 0.0, 1.0  # the same place of another part
    assert len({before, behind, int(digests([tensor]))}) == 3


def sharded(topology: Topology, model: torch.nn.Module) -> TiledOptimizer:
    check_shardable(model, topology.layout)
    shard_module(model, topology)
    parameters = dict(model.named_parameters())
    by_name = parameter_shardings(model, topology)
    shardings = {parameters[name]: sharding for name, sharding in by_name.items()}
    return TiledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), shardings, topology.world)


def changed_on_a_rank(name: str, rank: int) -> tuple[list[str], str]:
    """A tensor's last element is changed on one rank of four: what differs, and what is said of it."""
    topology = join(tensor=2, expert=2)
    torch.manual_seed(0)
    model = NormedDecoder(Declared)
    optimizer = sharded(topology, model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        if topology.world.rank == rank:
            tensors[name].view(-1)[-1] += 0.25
    replicas = list(copies(model, topology, optimizer))
    places = differing(replicas, topology)
    said = str(describe_difference(replicas[places[0]], topology)) if places else ""
    return [replicas[place].name for place in places], said


@pytest.mark.parametrize(
    ("name", "rank", "words"),
    [
        ("attend.query_norm.weight", 3, ("RMSNorm", "over data", "rank(s) 1", "rank(s) 3", "0.25")),
        ("experts.experts.up", 2, None),  # expert_data has one rank: there is no copy of it
        ("scale", 1, ("over tensor", "rank(s) 0", "rank(s) 1")),
        ("drawn", 1, None),  # not saved
    ],
)
def test_a_copy_that_differs_is_named(name: str, rank: int, words: tuple[str, ...] | None) -> None:
    outcomes = run_ranks(4, changed_on_a_rank, name, rank)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    names, said = outcomes[0]
    assert names == ([] if words is None else [name])
    for word in words or ():
        assert word in said, said


def test_what_is_declared_must_be_there_and_whole() -> None:
    class Wrong(HeadNorms):
        partial_gradients = ("query_norms",)

    class Sharded(HeadNorms):
        partial_gradients = ("query",)

    for kind, words in ((Wrong, "legal: query_norm.weight, key_norm.weight"), (Sharded, "query.weight is sharded")):
        with pytest.raises(UserValueError, match=words):
            check_shardable(kind(16, 4), Layout(2, tensor=2))


def two_kinds_of_nan() -> tuple[int, Difference | None]:
    """The same weight is NaN on all ranks, with another sign on one."""
    topology = join(tensor=2, expert=2)
    torch.manual_seed(0)
    model = NormedDecoder(Declared)
    optimizer = sharded(topology, model)
    with torch.no_grad():
        model.scale[1] = float("nan") if topology.world.rank else -torch.tensor(float("nan"))
    replicas = list(copies(model, topology, optimizer))
    (place,) = differing(replicas, topology)
    return place, describe_difference(replicas[place], topology)


def test_bits_that_mean_the_same_are_no_difference() -> None:
    assert {difference for _, difference in run_ranks(4, two_kinds_of_nan)} == {None}
