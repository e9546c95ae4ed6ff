"""Capacities of training and evaluation, the least, and whose choices overflow: against the loop, on layouts."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import case
from helpers.plain_moe import plain_moe
from helpers.topologies import join
from torch import Tensor, nn

from lightning_tex.moe import MoE
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, SEQUENCES, LENGTH = 6, 4, 4, 8


def build(**options: Any) -> MoE:
    torch.manual_seed(0)
    given = {"capacity_factor": 0.6, "load_balance_coefficient": 0.0, "norm_topk_prob": True, **options}
    layer = MoE(DIM, 8, EXPERTS, 2, **given).double()
    layer.router.weight.data *= 4  # a skewed routing
    return layer


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SEQUENCES, LENGTH, DIM, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.2


def by_score(layer: MoE, x: Tensor) -> list[int]:
    scores = (x @ layer.router.weight.T).softmax(-1).amax(-1).tolist()
    return sorted(range(len(x)), key=lambda t: (-scores[t], t))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = build(overflow_by="score")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mlp(x, mask)


def _own(parts: int, part: int, whole: Tensor) -> Tensor:
    return whole.chunk(parts, 1)[part]


def on_layouts(layouts: list[tuple[tuple[int, ...], bool, Any]]) -> None:
    for layout, sequence, mode in layouts:
        with case(layout, sequence=sequence, mode=mode):
            topology = join(*layout, sequence_parallel=sequence)
            data, tensor = topology.data, topology.tensor
            model = nn.Module()
            model.blocks = nn.ModuleList([Block()])
            reference, (x, mask) = copy.deepcopy(model.blocks[0].mlp), batch()
            shard_module(model, topology)
            recompute_blocks(model, mode)

            x, mask = x.chunk(data.size)[data.rank], mask.chunk(data.size)[data.rank]
            expected = x.clone().requires_grad_()
            flat = expected.flatten(0, 1)
            capacity = math.ceil(0.6 * 2 * len(flat) / EXPERTS)
            outcome = plain_moe(reference, flat, mask.flatten(), capacity, by_score(reference, flat))
            in_order = plain_moe(reference, flat, mask.flatten(), capacity)
            assert outcome.overflowed and not torch.equal(outcome.output, in_order.output)
            outcome.output.square().sum().backward()

            parts, part = (tensor.size, tensor.rank) if sequence else (1, 0)
            own = partial(_own, parts, part)

            given = own(x).clone().requires_grad_()
            y = model.blocks[0](given, mask)
            y.square().sum().backward()
            torch.testing.assert_close(y, own(outcome.output.view_as(x)), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(given.grad, own(expected.grad), rtol=1e-10, atol=1e-12)
            overflowed = model.blocks[0].mlp.load.take()[-1:]
            assert (all_reduce(overflowed, tensor) if sequence else overflowed) == outcome.overflowed


@pytest.mark.parametrize("world", [1, 4])
def test_with_priority_by_score_those_with_smaller_scores_overflow(world: int) -> None:
    on_four = [((2, 2, 2), False, "full"), ((2, 2, 2), True, "communication_aware"), ((4, 4, 1), True, None)]
    run_ranks(world, on_layouts, on_four if world == 4 else [((1, 1), False, None)])


@pytest.mark.parametrize(
    ("options", "training", "allowed"),
    [
        ({}, True, 10),
        ({}, False, 10),
        ({"eval_capacity_factor": 1.5}, True, 10),
        ({"eval_capacity_factor": 1.5}, False, 24),
        ({"min_capacity": 12}, True, 12),
        ({"min_capacity": 12, "eval_capacity_factor": 2.0}, False, 32),
        ({"min_capacity": 1000}, True, 32),
    ],
)
def test_how_many_choices_an_expert_takes(options: dict[str, Any], training: bool, allowed: int) -> None:
    layer, (x, mask) = build(**options).train(training), batch()
    layer.load.take()
    y = layer(x, mask)
    flat = x.flatten(0, 1)
    outcome = plain_moe(layer, flat, mask.flatten(), allowed)
    torch.testing.assert_close(y, outcome.output.view_as(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_capacity_factor": 0.0}, "eval_capacity_factor=0.0 must be positive"),
        ({"min_capacity": -1}, "min_capacity=-1; legal: 0, or above"),
        ({"overflow_by": "luck"}, "overflow_by='luck'; legal: 'position', 'score'"),
        (
            {"capacity_factor": None, "min_capacity": 2},
            "min_capacity=2, overflow_by='position' with capacity_factor=None",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserValueError, match=message):
        build(**options)
    with pytest.raises(UserValueError, match=r"capacity_factor=1\.0 for a layer with capacity_factor=None"):
        build(capacity_factor=None).capacity_factor = 1.0
