"""What is hard to route, by every router on ranks: as in one process, and nobody waits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import case
from helpers.topologies import join
from torch import Tensor

from lightning_tex.moe import MoE
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.parallel.topology import Axis
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, LENGTH = 6, 4, 4

ROUTERS: dict[str, tuple[Any, int]] = {
    "softmax": ("softmax", 2),
    "sigmoid": ({"name": "sigmoid", "init_args": {"bias_update_rate": 0.1}}, 2),
    "groups": ({"name": "softmax", "init_args": {"n_group": 2, "topk_group": 1}}, 2),
    "switch": ("switch", 1),
    "gshard": ("gshard", 2),
    "sparsemixer": ("sparsemixer", 2),
    "sinkhorn": ("sinkhorn", 2),
    "hash": ("hash", 2),
    "expert_choice": ("expert_choice", 2),
    "forced_balance": ("forced_balance", 2),  # by the place among a rank's tokens
}

# tensor, expert, expert_tensor; sequence parallel
LAYOUTS: dict[int, list[tuple[tuple[int, int, int], bool]]] = {
    2: [((1, 2, 1), False), ((2, 1, 2), False), ((2, 2, 1), True)],
    4: [((1, 4, 1), False), ((2, 2, 2), False), ((2, 2, 2), True), ((2, 4, 1), False), ((4, 1, 4), True)],
    8: [((1, 4, 1), False), ((2, 2, 2), True), ((2, 4, 1), False), ((4, 2, 4), False)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"capacity_factor": 0.5, "overflow_by": "score"},
    "rounds": {"round_factor": 1.0},
}


def ties(layer: MoE) -> None:
    if layer.router.learned:
        layer.router.weight.data.zero_()


def one_for_all(layer: MoE) -> None:
    if layer.router.learned:
        layer.router.weight.data.zero_()[2] = 5.0  # tokens' features are positive


def as_drawn(layer: MoE) -> None:
    pass


# Sequences of each data rank, what is real of them, and what is done to the router.
SCENARIOS: dict[str, tuple[Callable[[int], int], str, Callable[[MoE], None]]] = {
    "nobody has tokens": (lambda rank: 0, "all", as_drawn),
    "one sequence on one rank": (lambda rank: int(rank == 0), "all", as_drawn),
    "all are masked": (lambda rank: 2, "none", as_drawn),
    "one token is not masked": (lambda rank: 1 + rank % 2, "first", as_drawn),
    "ties everywhere": (lambda rank: 2, "all", ties),
    "one expert for all": (lambda rank: 2 - rank % 2, "all", one_for_all),
}


def batch(sequences: int, real: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(sequences, LENGTH, DIM, generator=generator, dtype=torch.float64)
    mask = torch.full((sequences, LENGTH), real == "all")
    if real == "first" and rank == 0:
        mask[0, 0] = True
    return x, mask, torch.randint(50, (sequences, LENGTH), generator=generator)


def outcome(layer: MoE, x: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, mask, token_ids=ids)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
    return y.detach(), x.grad if x.grad is not None else torch.zeros_like(x)


def part(of_tokens: Tensor, tensor: Axis, sequence: bool) -> Tensor:
    """What this rank holds of its data rank's tokens."""
    return of_tokens.chunk(tensor.size, 1)[tensor.rank] if sequence else of_tokens


def cases(world: int) -> Iterator[tuple[Any, ...]]:
    for layout in LAYOUTS[world]:
        for name in ROUTERS:
            for option in OPTIONS:
                legal = option == "dropless" or name != "expert_choice"
                if legal and not (layout[1] and name == "forced_balance"):
                    yield layout, name, option


def compare(world: int, every: int) -> None:
    for (sizes, sequence), name, option in list(cases(world))[::every]:
        topology = join(*sizes, sequence_parallel=sequence)
        router, top_k = ROUTERS[name]
        for what, (count, real, change) in SCENARIOS.items():
            with case(sizes, sequence, name, option, what):
                torch.manual_seed(0)
                layer = MoE(DIM, 8, EXPERTS, top_k, router=router, load_balance_coefficient=0.0, **OPTIONS[option])
                change(layer.double().eval())  # so that no token depends on another rank's
                reference = copy.deepcopy(layer)
                shard_module(layer, topology)
                own = partial(part, tensor=topology.tensor, sequence=sequence)
                given = batch(count(topology.data.rank), real, topology.data.rank)
                y, grad = outcome(reference, *given)

                x = own(given[0]).clone().requires_grad_()
                found = layer(x, own(given[1]), token_ids=own(given[2]))
                whole = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
                found.backward(own(whole))
                torch.testing.assert_close(found, own(y), rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(x.grad, own(grad), rtol=1e-11, atol=1e-12)
                assert not found[~own(given[1])].any()


def test_two_ranks_route_it_as_one_process_does() -> None:
    run_ranks(2, compare, 2, 11)


@pytest.mark.full
@pytest.mark.parametrize("world", LAYOUTS)
def test_all_of_it_on_every_layout(world: int) -> None:
    run_ranks(world, compare, world, 1, timeout=300)


@pytest.mark.parametrize("name", ROUTERS)
def test_more_choices_than_experts_are_refused(name: str) -> None:
    router, _ = ROUTERS[name]
    with pytest.raises(ValueError, match=r"top_k=5|n_group"):
        MoE(DIM, 8, EXPERTS, 5, router=router)
