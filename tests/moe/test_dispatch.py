"""Slots, permutation, dispatch and combine against plain loops."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.moe.capacity import Capacity, CapacityDispatcher, assign_slots, queues
from lightning_tex.moe.dispatch import Arrived
from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.exchange import ChunkedExchange, Exchange
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.experts import Experts
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import group_by_expert, invert, pick
from lightning_tex.moe.router import Route
from lightning_tex.parallel.device import device_type, pretend_device
from lightning_tex.parallel.started import Ready
from lightning_tex.parallel.topology import Axis


@st.composite
def choices(draw):
    """[T, k] choices of E experts, each token's distinct, or all E where the token is masked."""
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, experts))
    one = st.one_of(
        st.permutations(range(experts)).map(lambda p: p[:top_k]), st.just([experts] * top_k), st.just(range(top_k))
    )
    rows = draw(st.lists(one.map(list), max_size=9))
    return torch.tensor(rows, dtype=torch.int64).view(-1, top_k), experts


@given(choices(), st.integers(0, 6), st.integers(0, 3))
def test_assign_slots_is_the_plain_loop(case, capacity, extra):
    indices, experts = case
    tokens, top_k = indices.shape
    rows = capacity + extra
    slot = [[experts * rows] * top_k for _ in range(tokens)]
    choice = [tokens * top_k] * (experts * rows)
    taken = [0] * experts
    overflowed = 0
    for i in range(top_k):
        for t in range(tokens):
            e = int(indices[t, i])
            if e == experts:
                continue
            if taken[e] == capacity:
                overflowed += 1
                continue
            slot[t][i] = e * rows + taken[e]
            choice[slot[t][i]] = t * top_k + i
            taken[e] += 1
    queued = queues(indices, experts, capacity)
    slots = assign_slots(indices, queued.place, experts, capacity, rows)
    assert slots.slot.tolist() == slot
    assert slots.choice.tolist() == choice
    assert queued.overflowed == overflowed
    assert queued.counts.tolist() == [int((indices == e).sum()) for e in range(experts)]


def worked_route(indices, experts, dim=3):
    """A route with random weights of a random [T, D] input; nothing of it depends on a router."""
    tokens, top_k = indices.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).requires_grad_()
    empty = torch.zeros(tokens, experts)
    return x, Route(indices, weights, empty, empty)


class Travel(torch.autograd.Function):
    """One way of an exchange, whose backward is the other."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x).wait()

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad.clone()).wait(), None, None


def mixed(arrived: Arrived) -> torch.Tensor:
    """Expert e multiplies by e + 2: makes it visible which expert a row was at. Then by the row's weight. Then home."""
    exchange = arrived.exchange
    rows = Travel.apply(arrived.tokens, exchange.start_to_experts, exchange.start_from_experts)
    weights = Travel.apply(arrived.weights, exchange.start_choices_to_experts, exchange.start_choices_from_experts)
    sizes = exchange.groups.sizes
    factor = torch.tensor([e + 2.0 for e, n in enumerate(sizes) for _ in range(n)], dtype=torch.float64)
    assert len(factor) == len(rows) == len(weights) == arrived.here
    outputs = rows * (factor * weights)[:, None]
    return Travel.apply(outputs, exchange.start_from_experts, exchange.start_to_experts)


def loop(x, route, experts, capacity):
    output = [torch.zeros_like(row) for row in x]
    taken = [0] * experts
    for i in range(route.indices.shape[1]):
        for t in range(len(x)):
            e = int(route.indices[t, i])
            if e < experts and (capacity is None or taken[e] < capacity):
                taken[e] += 1
                output[t] = output[t] + route.weights[t, i] * (e + 2.0) * x[t]
    return torch.stack(output) if output else x * 1


@given(choices(), st.sampled_from([None, 0.3, 0.75, 1.0, 1.25, 4.0]), st.sampled_from(["cpu", "cuda"]))
def test_dispatch_and_combine_are_the_plain_loop(case, factor, device):
    with pretend_device(device):
        dispatch_and_combine(*case, factor)


def dispatch_and_combine(indices, experts, factor):
    alone = ExpertAxes(*map(Axis, ("expert", "tensor", "expert_tensor", "expert_tensor")))
    x, route = worked_route(indices, experts)
    if factor is None:
        dispatcher, capacity = DroplessDispatcher(experts, alone), None
    else:
        dispatcher = CapacityDispatcher(experts, alone, Capacity(factor))
        capacity = math.ceil(factor * indices.shape[1] * indices.shape[0] / experts)
    arrived, metadata = dispatcher.dispatch(x, route)
    y = dispatcher.combine(mixed(arrived), metadata)
    expected = loop(x, route, experts, capacity)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    served = (y.detach() != 0).any(-1) if len(x) else torch.zeros(0)
    assert served.sum() <= len(x)
    total = int((indices < experts).sum())
    if capacity is None:
        assert metadata.overflowed == 0
        sizes = [int((indices == e).sum()) for e in range(experts)]
        if device_type(x) != "cpu":  # masked choices are rows as well, of zeros
            sizes[-1] += indices.numel() - total
        assert arrived.exchange.groups.sizes == sizes
    else:
        assert metadata.overflowed == sum(max(0, int((indices == e).sum()) - capacity) for e in range(experts))
    if len(x) and total:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        leaves = [x, route.weights]
        for ours, theirs in zip(
            torch.autograd.grad(y, leaves, upstream),
            torch.autograd.grad(expected, leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@given(st.lists(st.integers(0, 4), max_size=20))
def test_grouping_is_a_stable_sort_with_masked_choices_last(values):
    order = group_by_expert(torch.tensor(values, dtype=torch.int64), 4)
    expected = sorted(range(len(values)), key=lambda j: values[j])
    assert order.sorted.tolist() == expected
    assert order.experts.tolist() == sorted(values)
    assert order.starts.tolist() == [sum(v < e for v in values) for e in range(5)]
    assert invert(order.sorted)[order.sorted].tolist() == list(range(len(values)))


def test_pick_gives_zeros_for_no_row():
    x = torch.randn(3, 2)
    index = torch.tensor([2, 0, 3, 2, 3])  # row 2 twice, row 1 never, 3 is nothing
    assert torch.equal(pick(x, index), torch.stack([x[2], x[0], torch.zeros(2), x[2], torch.zeros(2)]))
    assert torch.equal(pick(x[:0], torch.zeros(4, dtype=torch.int64)), torch.zeros(4, 2))
    x[0] = float("nan")  # of a row that is not picked nothing is seen
    assert torch.equal(pick(x, torch.tensor([3, 1])), torch.stack([torch.zeros(2), x[1]]))


class Stay(Exchange):
    """Rows that stay where they are."""

    def start_send(self, rows):
        return Ready(rows)

    start_bring = start_to_experts = start_from_experts = start_send
    start_choices_to_experts = start_choices_from_experts = start_send


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.sampled_from(["gelu", "swiglu"]))
def test_experts_serve_their_own_rows_and_without_rows_have_zero_gradient(sizes, activation):
    experts = Experts(3, 2, len(sizes), activation).double()
    rows = torch.randn(sum(sizes), 3, dtype=torch.float64).requires_grad_()
    weights = torch.rand(sum(sizes), dtype=torch.float64).requires_grad_()
    groups = Groups.of(sizes)
    stay = Stay(None, groups, None, False, torch.empty(0, 1), False)
    y = experts(Arrived(rows, weights, ChunkedExchange([stay])))
    owner = [e for e, n in enumerate(sizes) for _ in range(n)]
    expected = torch.zeros_like(y)
    for i, e in enumerate(owner):
        up = experts.up[e] @ rows[i]
        hidden = F.gelu(up) if experts.gate is None else F.silu(experts.gate[e] @ rows[i]) * up
        expected[i] = weights[i] * (experts.down[e] @ hidden)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    inputs = [rows, weights, *experts.parameters()]
    ours = torch.autograd.grad(y, inputs, upstream)
    theirs = torch.autograd.grad(expected + 0 * sum(p.sum() for p in inputs), inputs, upstream)
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their)
