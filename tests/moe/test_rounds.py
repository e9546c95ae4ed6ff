"""Dropless rows in rounds: the numbers of one round, a bound on what exists at once, and the same when recomputed."""

import re

import pytest
import torch
from helpers.cases import case
from helpers.topologies import join
from torch import nn

from lightning_tex.moe import MoE, auxiliary_loss
from lightning_tex.moe.expert_block import RowsAtOnce
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, TOP_K = 6, 8, 2
# tensor, expert, expert_tensor, split duplicates
LAYOUTS = [(1, 4, 1, True), (2, 2, 2, True), (2, 2, 2, False), (2, 4, 1, True), (1, 2, 1, True)]


class Block(nn.Module):
    def __init__(self, round_factor):
        super().__init__()
        self.mlp = MoE(DIM, 8, EXPERTS, TOP_K, None, "swiglu", round_factor=round_factor)

    def forward(self, x):
        return x + self.mlp(x).sin()


def step(topology, round_factor, mode=None):
    """Loss and gradients of a step whose choices mostly fall on the first rank's experts, and rows of each product."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(round_factor)]).double()
    with torch.no_grad():
        model.blocks[0].mlp.router.weight[:2] += 2
    shard_module(model, topology)
    recompute_blocks(model, mode)
    torch.manual_seed(1 + topology.data.rank)
    x = torch.randn(24, DIM, dtype=torch.float64).abs().requires_grad_()
    rows, inward = [], RowsAtOnce.inward

    def counted(block, arrived, matrices):
        rows.append(len(arrived))
        return inward(block, arrived, matrices)

    RowsAtOnce.inward = counted
    try:
        loss = model.blocks[0](x).square().sum() + auxiliary_loss(model)
        loss.backward()
    finally:
        RowsAtOnce.inward = inward
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())], rows


def rounds():
    for layout in LAYOUTS:
        topology = join(*layout)
        with case(layout):
            expected, [at_once] = step(topology, None)
            bounded, rows = step(topology, 1.0)
            for ours, theirs in zip(bounded, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            ranks = topology.expert.size
            of_group = torch.tensor(at_once)
            most = all_reduce(of_group, topology.expert, "max").item()
            bound = -(-all_reduce(of_group, topology.expert).item() // ranks)  # the mean
            of_a_round = -(-most // bound)
            assert of_a_round > 1
            assert len(rows) == 2 * of_a_round  # forward, and again in the backward
            rounding = EXPERTS * topology.expert_tensor.size  # for each expert here, of each sender, less than one
            assert max(rows) <= bound + rounding, (rows, bound)
            for mode in ("full", "communication_aware"):
                again, _ = step(topology, 1.0, mode)
                assert all(torch.equal(a, b) for a, b in zip(bounded, again, strict=True)), mode
            generous, rows = step(topology, float(EXPERTS))
            assert all(torch.equal(a, b) for a, b in zip(expected, generous, strict=True)) and rows == [at_once]


def test_rounds_give_the_numbers_of_one_and_bound_the_rows():
    run_ranks(4, rounds)


@pytest.mark.parametrize(("factor", "capacity"), [(0.5, None), (2.0, 1.25)])
def test_refused(factor, capacity):
    message = f"round_factor={factor} with capacity_factor={capacity}; legal: at least 1, with capacity_factor=None"
    with pytest.raises(ValueError, match=re.escape(message)):
        MoE(4, 8, 6, capacity_factor=capacity, round_factor=factor)
