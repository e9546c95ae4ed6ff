"""Balance by sequence and by optimizer step, and entropy: against loops over tokens, on layouts and micro-batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.cases import case
from helpers.plain_moe import plain_moe
from helpers.topologies import join
from torch import Tensor

from lightning_tex.moe import MoE, auxiliary_loss, step_is_over
from lightning_tex.parallel import collectives
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, SEQUENCES, LENGTH = 6, 4, 4, 6


def build(**coefficients: float) -> MoE:
    torch.manual_seed(0)
    off = {"load_balance_coefficient": 0.0}
    return MoE(DIM, 8, EXPERTS, 2, **{**off, **coefficients}).double()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.3
    mask[3] = False
    return torch.randn(SEQUENCES, LENGTH, DIM, generator=generator, dtype=torch.float64), mask


def counts_of(choices: list[list[int]]) -> list[int]:
    return [sum(chosen.count(e) for chosen in choices) for e in range(EXPERTS)]


def balance(scores: list[Tensor], counts: list[int]) -> Tensor:
    """E * sum_e f_e P_e."""
    means = sum(scores) / len(scores)
    return EXPERTS * sum(counts[e] / sum(counts) * means[e] for e in range(EXPERTS))


def by_sequence(layer: MoE, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    (batch,) = batches
    losses = []
    for x, mask in zip(*batch, strict=True):
        outcome = plain_moe(layer, x, mask)
        if mask.any():
            real = [s for s, kept in zip(outcome.scores, mask, strict=True) if kept]
            losses.append(balance(real, counts_of(outcome.choices)))
    return sum(losses) / len(losses)


def by_step(layer: MoE, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over micro-steps, each of which knows the choices of those before it."""
    counts, losses = [0] * EXPERTS, []
    for x, mask in batches:
        outcome = plain_moe(layer, x.flatten(0, 1), mask.flatten())
        counts = [a + b for a, b in zip(counts, counts_of(outcome.choices), strict=True)]
        losses.append(balance([s for s, real in zip(outcome.scores, mask.flatten(), strict=True) if real], counts))
    return sum(losses) / len(losses)


def entropy(layer: MoE, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    ((x, mask),) = batches
    scores = plain_moe(layer, x.flatten(0, 1)).scores
    of_tokens = [-sum(p * torch.log(p) for p in row) for row, real in zip(scores, mask.flatten(), strict=True) if real]
    return sum(of_tokens) / len(of_tokens)


LOSSES: dict[str, tuple[Any, int]] = {
    "sequence_balance_coefficient": (by_sequence, 1),
    "step_balance_coefficient": (by_step, 3),
    "entropy_coefficient": (entropy, 1),
}


def on_layouts(layouts: list[tuple[tuple[int, ...], bool]]) -> None:
    for layout, sequence in layouts:
        topology = join(*layout, sequence_parallel=sequence)
        data, tensor = topology.data, topology.tensor
        for name, (plain, micro_steps) in LOSSES.items():
            with case(layout, name, sequence=sequence):
                layer = build(**{name: 0.7})
                alone = copy.deepcopy(layer)
                shard_module(layer, topology)
                batches = [batch(seed) for seed in range(1, micro_steps + 1)]
                loss = torch.zeros((), dtype=torch.float64)
                for x, mask in batches:
                    own, own_mask = x.chunk(data.size)[data.rank], mask.chunk(data.size)[data.rank]
                    own = own.chunk(tensor.size, 1)[tensor.rank] if sequence else own
                    layer(own, own_mask)
                    loss = loss + auxiliary_loss(layer) / micro_steps
                loss.backward()
                step_is_over(layer)
                gradient = collectives.all_reduce(layer.router.weight.grad, data) / data.size
                gradient = collectives.all_reduce(gradient, tensor) if sequence else gradient
                expected = 0.7 * plain(alone, batches)
                expected.backward()
                torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(gradient, alone.router.weight.grad, rtol=1e-10, atol=1e-12)
                assert layer._step_counts is None


@pytest.mark.parametrize("world", [1, 4])
def test_they_are_those_of_the_loop_over_all_ranks_tokens(world: int) -> None:
    on_four = [((2, 2, 2), True), ((1, 4, 1), False), ((4, 1, 4), False)]
    run_ranks(world, on_layouts, on_four if world == 4 else [((1, 1), False)])


@pytest.mark.parametrize("name", ["sequence_balance_coefficient", "entropy_coefficient", "z_loss_coefficient"])
def test_means_over_sequences_and_tokens_do_not_depend_on_the_micro_batch(name: str) -> None:
    x, _ = batch()
    found = []
    for parts in (1, 2, 4):
        layer = build(**{name: 0.3})
        for part in x.chunk(parts):
            layer(part)
            (auxiliary_loss(layer) / parts).backward()
        found.append(layer.router.weight.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


def test_the_last_micro_step_balances_by_all_choices_of_the_step() -> None:
    x, _ = batch()
    whole, parts = build(step_balance_coefficient=1.0), build(step_balance_coefficient=1.0)
    whole(x)
    for part in x.chunk(2):
        parts(part)
    assert torch.equal(whole._step_counts, parts._step_counts)
    one, two = build(load_balance_coefficient=1.0), build(step_balance_coefficient=1.0)
    one(x), two(x)
    torch.testing.assert_close(auxiliary_loss(one), auxiliary_loss(two))


def test_nobody_is_a_loss_of_nothing() -> None:
    layer = build(sequence_balance_coefficient=1.0, step_balance_coefficient=1.0, entropy_coefficient=1.0)
    x, mask = batch()
    for tokens, of_tokens in ((x, torch.zeros_like(mask)), (x[:0], mask[:0])):
        layer(tokens, of_tokens)
        loss = auxiliary_loss(layer)
        loss.backward()
        assert loss == 0 and not layer.router.weight.grad.any()
