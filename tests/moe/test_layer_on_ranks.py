"""MoE on four ranks, every layout, against the plain loop over each data rank's own tokens."""

import copy
import math

import pytest
import torch
from helpers.cases import case
from helpers.plain_moe import plain_moe
from helpers.topologies import join
from torch.utils.checkpoint import checkpoint

from lightning_tex.moe import MoE, auxiliary_loss
from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.testing.ranks import run_ranks

# tensor, expert, expert_tensor, split duplicates
LAYOUTS = [
    (1, 4, 1, True),
    (1, 2, 1, True),
    (2, 2, 2, True),
    (2, 2, 2, False),
    (2, 2, 1, True),
    (2, 4, 1, True),
    (4, 1, 4, True),
    (4, 1, 4, False),
    (4, 4, 1, True),
]
DIM, EXPERTS = 6, 4

# What each data rank's tokens want: their first two choices, in order.
ROUTES = {
    "anything, T differs": lambda r: [None] * [7, 3, 8, 1][r],
    "a rank with no tokens": lambda r: [None] * [5, 0, 6, 0][r],
    "nobody has tokens": lambda r: [],
    "all on one expert": lambda r: [(3, 1)] * [4, 7, 1, 2][r],
    "an expert group without tokens": lambda r: [(0, 1), (1, 0)] * [2, 3, 1, 0][r],
}


def tokens_of(scenario, rank):
    """[T, D] tokens whose first EXPERTS features say where they go; the router's weight is diagonal."""
    generator = torch.Generator().manual_seed(rank)
    wanted = ROUTES[scenario](rank)
    x = torch.randn(len(wanted), DIM, generator=generator, dtype=torch.float64)
    for row, want in zip(x, wanted, strict=True):
        if want is not None:
            row[:EXPERTS] *= 0.01
            row[want[0]], row[want[1]] = 1.0, 0.8
    return x


def build(capacity_factor, activation, top_k=2, **options):
    torch.manual_seed(0)
    layer = MoE(
        DIM,
        8,
        EXPERTS,
        top_k,
        capacity_factor,
        activation,
        norm_topk_prob=True,
        load_balance_coefficient=0.0,
        **options,
    ).double()
    layer.router.weight.data = 3 * torch.eye(EXPERTS, DIM, dtype=torch.float64)
    return layer


def compare_all(capacity_factor, activation, **options):
    overflowed = 0
    for layout in LAYOUTS:
        topology = join(*layout)
        data = topology.data
        for scenario in ROUTES:
            with case(layout, scenario):
                layer = build(capacity_factor, activation, **options)
                reference = copy.deepcopy(layer)
                check_shardable(layer, topology.layout)
                shard_module(layer, topology)

                inputs = [tokens_of(scenario, r) for r in range(data.size)]
                upstream = [torch.cos(torch.arange(x.numel()).double()).view_as(x) for x in inputs]
                mine = inputs[data.rank].requires_grad_()
                y = layer(mine)
                y.backward(upstream[data.rank])
                load = layer.load.take()

                expected_grad = {}
                for r, x in enumerate(inputs):
                    x = x.detach().clone().requires_grad_()
                    capacity = capacity_factor and math.ceil(capacity_factor * 2 * len(x) / EXPERTS)
                    outcome = plain_moe(reference, x, capacity=capacity)
                    outcome.output.backward(upstream[r])
                    if r == data.rank:
                        torch.testing.assert_close(y, outcome.output, rtol=1e-12, atol=1e-12)
                        torch.testing.assert_close(mine.grad, x.grad, rtol=1e-12, atol=1e-12)
                        assert load[-1] == outcome.overflowed
                        assert load[:-1].sum() == 2 * len(x)
                        overflowed += outcome.overflowed
                for name, p in reference.named_parameters():
                    expected_grad[name] = torch.zeros_like(p) if p.grad is None else p.grad / data.size
                found = parameter_shardings(layer, topology)
                for name, p in layer.named_parameters():
                    at = found[name]
                    gradient = at.gather(all_reduce(p.grad, at.replicas) / at.divisor)
                    torch.testing.assert_close(
                        gradient,
                        expected_grad[name],
                        rtol=1e-12,
                        atol=1e-12,
                        msg=lambda m, n=name: f"{n}: {m}",
                    )
    return overflowed


@pytest.mark.parametrize(
    ("capacity_factor", "activation"),
    [
        (None, "swiglu"),
        (0.7, "gelu"),
        pytest.param(None, "gelu", marks=pytest.mark.full),
        pytest.param(1.3, "swiglu", marks=pytest.mark.full),
    ],
)
def test_every_layout_serves_every_token_as_one_process_does(capacity_factor, activation):
    overflowed = run_ranks(4, compare_all, capacity_factor, activation)
    assert (max(overflowed) > 0) == (capacity_factor is not None)


def masked_and_top_1():
    for layout in LAYOUTS:
        topology = join(*layout)
        data = topology.data
        for capacity_factor in (None, 1.0):
            with case(layout, capacity_factor=capacity_factor):
                layer = build(capacity_factor, "gelu", top_k=1)
                reference = copy.deepcopy(layer)
                shard_module(layer, topology)
                x = tokens_of("anything, T differs", data.rank)
                mask = torch.arange(len(x)) % 3 != 1 if data.rank < 2 else torch.zeros(len(x)).bool()
                capacity = capacity_factor and math.ceil(capacity_factor * len(x) / EXPERTS)
                expected = plain_moe(reference, x, mask, capacity).output
                torch.testing.assert_close(layer(x, mask), expected, rtol=1e-12, atol=1e-12)


def test_masks_travel_with_no_token():
    run_ranks(4, masked_and_top_1)


def disagreeing_routers():
    # Scores that round differently over tensor must not send a token two ways: rank 0 decides.
    topology = join(tensor=4, expert=1, expert_tensor=4)
    torch.manual_seed(0)
    layer = MoE(DIM, 8, EXPERTS, top_k=2)
    shard_module(layer, topology)
    x = torch.ones(5, DIM)
    layer.router.weight.data.zero_()
    layer.router.weight.data[topology.tensor.rank] += 1e-6  # each rank prefers another expert
    return layer.router(x).indices[:, 0].tolist()


def test_tensor_ranks_follow_the_first_ones_choice():
    assert run_ranks(4, disagreeing_routers) == [[0] * 5] * 4


def recomputed():
    for layout in LAYOUTS:
        topology = join(*layout)
        for capacity_factor in (None, 0.7):
            with case(layout, capacity_factor=capacity_factor):
                gradients = []
                for recompute in (False, True):
                    layer = build(capacity_factor, "swiglu")
                    layer.load_balance_coefficient, layer.z_loss_coefficient = 0.5, 0.1
                    shard_module(layer, topology)
                    x = tokens_of("a rank with no tokens", topology.data.rank).requires_grad_()
                    y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
                    (y.square().sum() + auxiliary_loss(layer)).backward()
                    gradients.append([x.grad, *(p.grad for p in layer.parameters())])
                for plain, again in zip(*gradients, strict=True):
                    assert torch.equal(plain, again)


def test_recomputation_reroutes_nothing_and_counts_the_loss_once():
    run_ranks(4, recomputed)


class FirstChoices(DroplessDispatcher):
    """A user's way to dispatch: only first choices are served."""

    def dispatch(self, x, route):
        indices = route.indices.clone()
        indices[:, 1:] = self.num_experts
        return super().dispatch(x, route._replace(indices=indices))


class FirstChoiceMoE(MoE):
    def make_dispatcher(self, topology):
        return FirstChoices(self.num_experts, ExpertAxes.of(topology))


def own_layer_and_tokens():
    torch.manual_seed(0)
    return FirstChoiceMoE(DIM, 8, EXPERTS, top_k=2).double(), torch.randn(5, DIM, dtype=torch.float64)


def plain_output():
    layer, x = own_layer_and_tokens()
    plain = MoE(DIM, 8, EXPERTS, top_k=1).double()
    plain.load_state_dict(layer.state_dict())
    return plain(x).detach()


def own_output(layout):
    layer, x = own_layer_and_tokens()
    shard_module(layer, join(*layout))
    return type(layer.dispatcher), layer(x).detach()


@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (2, 1), (2, 2, 1)], ids=str)
def test_a_layer_of_ones_own_dispatches_its_own_way_on_any_layout(layout):
    [expected] = run_ranks(1, plain_output)
    for dispatcher, output in run_ranks(max(layout), own_output, layout):
        assert dispatcher is FirstChoices
        torch.testing.assert_close(output, expected)
