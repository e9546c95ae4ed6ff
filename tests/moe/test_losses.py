"""What reaches the gradient, exactly once and exactly scaled, and who is told when nothing does."""

import copy
import math
import warnings

import pytest
import torch
from helpers.cases import case
from helpers.plain_moe import plain_losses, plain_moe
from helpers.topologies import join
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_tex.moe import MoE, Route, auxiliary_loss
from lightning_tex.moe.losses import Coefficients, count_choices, routing_loss
from lightning_tex.parallel import collectives
from lightning_tex.parallel.activation_layout import Replicated
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.parallel.topology import Axis
from lightning_tex.testing.ranks import run_ranks


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moe(**options):
    torch.manual_seed(0)
    return MoE(6, 10, 4, **options).double()


# --- formulas


def loss_of(route, load_balance, z):
    counts = count_choices(route.indices, route.scores.shape[1])
    coefficients = Coefficients(load_balance, z)
    return routing_loss(route, counts, None, Axis("data"), Replicated(Axis("tensor")), coefficients)[0].item()


def test_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    scores = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64)
    route = Route(torch.tensor([[0], [0]]), scores[:, :1], scores, logits)
    balance, z = 2 * (1.0 * 0.625 + 0.0 * 0.375), (math.log(2) ** 2 + math.log(4) ** 2) / 2
    torch.testing.assert_close(loss_of(route, 1, 0), balance)
    torch.testing.assert_close(loss_of(route, 0, 1), z)
    torch.testing.assert_close(loss_of(route, 0.2, 3), 0.2 * balance + 3 * z)


def test_balanced_routing_costs_one_and_collapse_costs_the_number_of_experts():
    uniform = torch.full((8, 4), 0.25)
    even = Route(torch.arange(8)[:, None] % 4, uniform[:, :1], uniform, uniform)
    assert loss_of(even, 1, 0) == pytest.approx(1)
    sure = torch.eye(4)[[2] * 8]
    assert loss_of(Route(torch.full((8, 1), 2), sure[:, :1], sure, sure), 1, 0) == pytest.approx(4)


def test_a_single_token_is_its_own_mean():
    layer, x = moe(load_balance_coefficient=1.0, z_loss_coefficient=1.0), randn(1, 3, 6)
    layer(x[:1])
    torch.testing.assert_close(auxiliary_loss(layer), expected_auxiliary(layer, x[:1]))
    layer(x, torch.tensor([False, False, True]))
    torch.testing.assert_close(auxiliary_loss(layer), expected_auxiliary(layer, x[2:]))


def test_masked_choices_fall_on_no_expert():
    assert count_choices(torch.tensor([[0, 2], [3, 3], [2, 1]]), 3).tolist() == [1, 1, 2]
    assert count_choices(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("top_k", [1, 2])
def test_masked_tokens_count_nowhere(top_k):
    layer = moe(top_k=top_k, load_balance_coefficient=1.0, z_loss_coefficient=1.0)
    x, mask = randn(1, 9, 6), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0]).bool()
    junk = x.clone()
    junk[~mask] = 50.0
    losses = []
    for tokens, tokens_mask in ((x, mask), (junk, mask), (x[mask], None)):
        layer(tokens, tokens_mask)
        loss = auxiliary_loss(layer)
        losses.append((loss.detach(), torch.autograd.grad(loss, layer.router.weight)[0]))
    for loss, gradient in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0])
        torch.testing.assert_close(gradient, losses[0][1])


# --- over ranks

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 1, 1), (4, 1)]
TOKENS = [5, 0, 3, 8]


def union_of_tokens(masked, top_k):
    worst = 0.0
    for layout in LAYOUTS:
        with case(layout):
            topology = join(*layout)
            layer = moe(top_k=top_k, load_balance_coefficient=0.7, z_loss_coefficient=0.4)
            alone = copy.deepcopy(layer)
            shard_module(layer, topology)
            data = topology.data
            tokens = [randn(r, TOKENS[r], 6) for r in range(data.size)]
            masks = [torch.rand(len(x), generator=torch.Generator().manual_seed(r)) > 0.4 for r, x in enumerate(tokens)]
            masks = masks if masked else [None] * data.size

            layer(tokens[data.rank], masks[data.rank])
            loss = auxiliary_loss(layer)
            loss.backward()
            averaged = collectives.all_reduce(layer.router.weight.grad, data) / data.size

            outcomes = [plain_moe(alone, x, mask) for x, mask in zip(tokens, masks, strict=True)]
            balance, z = plain_losses(outcomes, masks, 4)
            expected = 0.7 * balance + 0.4 * z
            expected.backward()
            torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(averaged, alone.router.weight.grad, rtol=1e-12, atol=1e-12)
            worst = max(worst, averaged.abs().max().item())
    return worst


@pytest.mark.parametrize(("masked", "top_k"), [(False, 1), (False, 2), (True, 2)])
def test_on_any_layout_loss_and_gradient_are_those_of_the_union_of_tokens(masked, top_k):
    assert min(run_ranks(4, union_of_tokens, masked, top_k)) > 1e-3


# --- the ledger


def expected_auxiliary(layer, x):
    outcome = plain_moe(layer, x)
    balance, z = plain_losses([outcome], [None], layer.num_experts)
    return layer.load_balance_coefficient * balance + layer.z_loss_coefficient * z


def test_auxiliary_loss_sums_all_layers_and_forwards_and_clears():
    model = nn.ModuleList([moe(), moe(z_loss_coefficient=0.5)])
    x, y = randn(1, 7, 6), randn(2, 4, 6)
    for tokens in (x, y):
        for layer in model:
            layer(tokens)
    expected = sum(expected_auxiliary(layer, tokens) for layer in model for tokens in (x, y))
    torch.testing.assert_close(auxiliary_loss(model), expected)
    assert auxiliary_loss(model) == 0


def test_nothing_is_recorded_in_evaluation_without_grad_or_with_zero_coefficients():
    layer, x = moe(), randn(1, 7, 6)
    layer.eval()
    layer(x)
    assert auxiliary_loss(layer) == 0
    assert layer.load.take() is None
    layer.train()
    with torch.no_grad():
        layer(x)
    assert auxiliary_loss(layer) == 0
    silent = moe(load_balance_coefficient=0.0)
    silent(x).sum().backward()
    assert auxiliary_loss(silent) == 0
    assert auxiliary_loss(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_under_checkpointing_the_loss_and_the_load_count_exactly_once(capacity_factor):
    x = randn(1, 9, 6)
    gradients, losses, loads = [], [], []
    for recompute in (False, True):
        layer = moe(top_k=2, load_balance_coefficient=0.5, capacity_factor=capacity_factor)
        tokens = x.clone().requires_grad_()
        y = checkpoint(layer, tokens, use_reentrant=False) if recompute else layer(tokens)
        auxiliary = auxiliary_loss(layer)
        (y.square().sum() + auxiliary).backward()
        assert auxiliary_loss(layer) == 0
        losses.append(auxiliary.detach())
        loads.append(layer.load.take())
        gradients.append([tokens.grad, *(p.grad for p in layer.parameters())])
    assert losses[0] == losses[1] > 0
    assert torch.equal(loads[0], loads[1])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_nobody_collecting_is_warned_about_once():
    layer, x = moe(), randn(1, 7, 6).requires_grad_()
    y = layer(x)
    with pytest.warns(UserWarning, match="auxiliary loss was not collected before backward"):
        y.sum().backward()
    assert auxiliary_loss(layer) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sum().backward()
    assert auxiliary_loss(layer) == 0


def test_collecting_warns_of_nothing_and_the_loss_reaches_the_gradient_once():
    layer, x = moe(load_balance_coefficient=0.5), randn(1, 7, 6)
    reference = copy.deepcopy(layer)
    y = layer(x)
    (y.sum() + auxiliary_loss(layer)).backward()
    outcome = plain_moe(reference, x)
    (outcome.output.sum() + expected_auxiliary(reference, x)).backward()
    torch.testing.assert_close(layer.router.weight.grad, reference.router.weight.grad)


def test_a_copy_of_a_layer_holds_no_loss_of_the_original():
    layer = moe()
    layer(randn(1, 7, 6))
    assert auxiliary_loss(copy.deepcopy(layer)) == 0
    assert auxiliary_loss(layer) > 0
