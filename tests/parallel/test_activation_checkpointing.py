"""Recomputation: bit for bit the plain backward; communication-aware, without repeating a collective."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from helpers.cases import case
from helpers.topologies import join
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_tex.layers import ParallelAttention, ParallelMLP
from lightning_tex.moe import MoE, Route, Router, SoftmaxRouter, Tokens, auxiliary_loss
from lightning_tex.parallel.activation_checkpointing import recompute_blocks, stash_bytes
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.parallel.topology import Axis
from lightning_tex.testing.ranks import run_ranks

MODES = (None, "full", "communication_aware")
# tensor, expert, expert_tensor, duplicate_token_dropping
FEW = ((2, 2, 2, True), (2, 2, 2, False), (2, 4, 1, True))
MORE = ((4, 1, 4, True), (1, 4, 1, True), (4, 4, 1, True))
ON_LAYOUTS = pytest.mark.parametrize("layouts", [FEW, pytest.param(MORE, marks=pytest.mark.full)], ids=["few", "more"])
OPTIONS = ({}, {"top_k": 1, "capacity_factor": 1.0})


class Block(nn.Module):
    """A MoE layer in the middle, so that collectives follow its loss; dropout, and a router that ties everything."""

    def __init__(self, capacity_factor: float | None, top_k: int) -> None:
        super().__init__()
        self.attention = ParallelAttention(16, 4, dropout=0.2)
        self.moe = MoE(16, 24, 8, top_k, capacity_factor, z_loss_coefficient=1e-3)
        self.mlp = ParallelMLP(16, 24, "swiglu")
        self.drop = nn.Dropout(0.2)
        with torch.no_grad():
            self.moe.router.weight.mul_(1e-7)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.moe(x))
        x = x + self.attention(x)
        return x + self.drop(self.mlp(x))


class Stack(nn.Module):
    def __init__(self, capacity_factor: float | None = None, top_k: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(capacity_factor, top_k) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(topology, mode, **options) -> Stack:
    torch.manual_seed(0)
    model = Stack(**options)
    shard_module(model, topology)
    recompute_blocks(model, mode)
    return model


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def batch(topology) -> Tensor:
    torch.manual_seed(10 + topology.data.rank)
    return torch.randn(3, 5, 16, requires_grad=True)


def passes(topology, mode, accumulate=2, **options):
    model, results = build(topology, mode, **options), []
    torch.manual_seed(20 + topology.data.rank)
    with topology.world.meter.measure() as meter:
        meter.clear()
        for _ in range(accumulate):
            x = batch(topology)
            loss = model(x).square().sum() + auxiliary_loss(model)
            loss.backward()
            results += [loss.detach(), x.grad]
    during = {kind.during for kind in meter.sent_bytes()}
    return results + grads(model), during, stash_bytes(model)


def compare_modes(layouts):
    for layout, options in product(layouts, OPTIONS):
        topology = join(*layout)
        plain, _, nothing = passes(topology, None, **options)
        assert nothing == {}
        for mode in MODES[1:]:
            with case(layout, mode=mode, **options):
                again, during, stash = passes(topology, mode, **options)
                same = [torch.equal(a, b) for a, b in zip(plain, again, strict=True)]
                assert all(same), same
                assert ("recompute" in during) == (mode == "full"), during
                assert (sum(stash.values()) > 0) == (mode == "communication_aware")


@ON_LAYOUTS
def test_recomputation_is_bit_equal_and_the_tape_repeats_no_collective(layouts):
    run_ranks(4, compare_modes, layouts)


def test_one_process_recomputes_without_processes():
    def alone():
        from lightning_tex.parallel.topology import Topology

        results = []
        for mode in MODES:
            model = build(Topology.single(), mode)
            torch.manual_seed(3)
            x = torch.randn(2, 4, 16, requires_grad=True)
            (model(x).square().sum() + auxiliary_loss(model)).backward()
            results.append([x.grad, *grads(model)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    run_ranks(1, alone)


def awkward_uses():
    topology = join(2, 2, 2, True)
    reference = build(topology, None)
    torch.manual_seed(1)
    first, second = batch(topology), batch(topology).flip(0).detach()
    torch.manual_seed(2)
    (reference(first).sum() + reference(second).square().sum() + auxiliary_loss(reference)).backward()
    expected = grads(reference)
    for mode in MODES[1:]:
        model = build(topology, mode)
        torch.manual_seed(2)
        loss = model(first).sum() + model(second).square().sum() + auxiliary_loss(model)  # two forwards in flight
        with torch.no_grad():
            model.eval()(first)  # validation in between
            model.train()
        model(first)  # a forward without backward
        auxiliary_loss(model)
        loss.backward(retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, grads(model), strict=True)), mode
        model.zero_grad()
        loss.backward()  # a second backward reads the tape again
        assert all(torch.equal(a, b) for a, b in zip(expected, grads(model), strict=True)), mode


def test_two_forwards_in_flight_validation_in_between_and_a_second_backward():
    run_ranks(4, awkward_uses)


class Undecided(Router):
    """Chooses other experts at every call, all with one weight: what a recomputation must not ask again."""

    calls = 0

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Route:
        self.calls += 1
        indices = (torch.arange(len(x))[:, None] * self.calls + torch.arange(self.top_k)) % self.num_experts
        scores = x.new_full((len(x), self.num_experts), 1 / self.num_experts)
        return Route(indices, x.new_full(indices.shape, 0.5), scores, scores)


class Wavering(SoftmaxRouter):
    """Scores other experts best at every call."""

    calls = 0

    def score(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return super().score(logits.roll(self.calls, -1))


def deciding(topology, mode, router, capacity_factor):
    """Gradients of a block with such a router, and the choices of both passes."""
    torch.manual_seed(0)
    model, choices = Stack(capacity_factor), []
    for block in model.blocks:
        block.moe = MoE(16, 24, 8, 2, capacity_factor, router=router, load_balance_coefficient=0)
        block.moe.router.register_forward_hook(lambda _, __, route: choices.append(route.indices))
    shard_module(model, topology)
    recompute_blocks(model, mode)
    torch.manual_seed(10 + topology.data.rank)
    x = torch.randn(3, 4, 16, requires_grad=True)
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)], choices


def decide_once():
    for layout, sequence in (((1, 2, 1, True), False), ((2, 1, 2, True), False), ((2, 2, 1, True), True)):
        topology = join(*layout, sequence_parallel=sequence)
        for capacity_factor, mode in product((None, 1.0), MODES[1:]):
            with case(layout, sequence, mode=mode, capacity_factor=capacity_factor):
                expected, _ = deciding(topology, None, Undecided, capacity_factor)
                found, _ = deciding(topology, mode, Undecided, capacity_factor)
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
                _, (first, second, again_second, again_first) = deciding(topology, mode, Wavering, capacity_factor)
                assert torch.equal(first, again_first) and torch.equal(second, again_second)


def test_a_router_that_answers_differently_the_second_time_changes_nothing():
    run_ranks(2, decide_once)


def nested():
    topology = join(2, 2, 2, True)
    results = []
    for mode in MODES:
        torch.manual_seed(0)
        model = Stack()
        shard_module(model, topology)
        recompute_blocks(model, mode, {Block, MoE, ParallelAttention})
        torch.manual_seed(5)
        x = batch(topology)
        with topology.world.meter.measure() as meter:
            meter.clear()
            (model(x).square().sum() + auxiliary_loss(model)).backward()
        if mode == "communication_aware":
            assert "recompute" not in {kind.during for kind in meter.sent_bytes()}
        results.append(grads(model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nested_blocks():
    run_ranks(4, nested)


class Scripted(nn.Module):
    """Does what it is told with one all-reduce, told anew at every forward."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis, self.script = axis, []
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.script.pop(0)(self, x)


def reduced(module: Scripted, x: Tensor) -> Tensor:
    return (all_reduce(x.detach(), module.axis) * module.weight).sin()


def reduced_other_shape(module: Scripted, x: Tensor) -> Tensor:
    return (all_reduce(x.detach()[:2], module.axis).repeat(2) * module.weight).sin()


def reduced_twice(module: Scripted, x: Tensor) -> Tensor:
    return (all_reduce(all_reduce(x.detach(), module.axis), module.axis) * module.weight).sin()


def changed_in_place(module: Scripted, x: Tensor) -> Tensor:
    total = all_reduce(x.detach(), module.axis)
    y = (total * 1.0 * module.weight).sin()
    total.add_(1)
    return y


def fails(module: Scripted, x: Tensor) -> Tensor:
    all_reduce(x, module.axis)
    raise ArithmeticError("in the middle")


def refusals():
    topology = join(4, 1, 4, True)
    holder = nn.Module()
    holder.block = Scripted(topology.tensor)
    recompute_blocks(holder, "communication_aware", {Scripted})
    x = torch.ones(4, requires_grad=True)

    def run(first, again):
        holder.block.script = [first, again]
        y = holder.block(x)
        y.sum().backward()

    run(reduced, reduced)
    for first, again, message in (
        (reduced, reduced_other_shape, "asks for all_reduce over tensor of .*2.* where the first forward did"),
        (reduced, reduced_twice, "which the first forward did not do"),
        (changed_in_place, changed_in_place, "changed in place"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(first, again)
        holder.block.weight.grad = None
        run(reduced, reduced)  # a refusal leaves nothing behind
        assert torch.equal(holder.block.weight.grad, 4 * torch.full((4,), 4.0).cos())
    with pytest.raises(ArithmeticError):
        run(fails, fails)
    run(reduced, reduced)
    return copy.deepcopy(holder) is not None


def test_a_block_that_does_something_else_the_second_time_is_refused():
    assert all(run_ranks(4, refusals))


def test_a_policy_that_finds_nothing_names_what_it_looked_for():
    with pytest.raises(
        ValueError, match=r"finds nothing to recompute in Linear: looked for elements of nn\.ModuleLists"
    ):
        recompute_blocks(nn.Linear(2, 2), "full")
    with pytest.raises(ValueError, match=r"looked for \['MoE'\]"):
        recompute_blocks(nn.Linear(2, 2), "communication_aware", {MoE})


def test_taking_it_back():
    model = Stack()
    assert recompute_blocks(model, "full") == ["blocks.0", "blocks.1"]
    assert recompute_blocks(model, None) == []
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_product_whose_outcome_is_replayed_is_not_computed_again():
    tokens, dim, hidden = 12, 8, 16
    flops = {}
    for mode in ("full", "communication_aware"):
        model = nn.Module()
        model.blocks = nn.ModuleList([MoE(dim, hidden, 4)])
        recompute_blocks(model, mode)
        y = model.blocks[0](torch.randn(tokens, dim, requires_grad=True))
        with FlopCounterMode(display=False) as counter:
            (y.square().sum() + auxiliary_loss(model)).backward()
        flops[mode] = counter.get_total_flops()
    product, router = 2 * tokens * hidden * dim, 2 * tokens * 4 * dim
    # Of the forward what comes before the experts' last product, and two products of the backward for each.
    assert flops["full"] == flops["communication_aware"] == (1 + 2 * 2) * product + (1 + 2) * router


def outputs_in_both_passes(layouts):
    for layout, options in product(layouts, OPTIONS):
        with case(layout, **options):
            topology = join(*layout)
            model = build(topology, "communication_aware", **options)
            block = model.blocks[0]
            outputs = {"experts": [], "attention.out": [], "moe": []}
            for module, seen in zip((block.moe.experts, block.attention.out, block.moe), outputs.values(), strict=True):
                module.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.detach().clone()))
            (model(batch(topology)).square().sum() + auxiliary_loss(model)).backward()
            for name, (first, *again) in outputs.items():
                assert first.abs().sum() > 0, name
                assert len(again) == 1 and torch.equal(first, again[0]), name


@ON_LAYOUTS
def test_a_forward_hook_sees_the_same_values_in_the_recomputation(layouts):
    run_ranks(4, outputs_in_both_passes, layouts)


class Named(nn.Module):
    """A block that is called with keywords only, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ParallelMLP(8, 8, "swiglu")])
        self.drop = nn.Dropout(0.5)
        self.blocks[0].forward = lambda x, scale: self.drop(type(self.blocks[0]).forward(self.blocks[0], x)) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x=x, scale=2.0)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_block_called_with_keywords_draws_the_same_again(mode, monkeypatch) -> None:
    """Its arguments reach torch by place: torch keeps the random state of those GPUs only that these lie on."""
    module = Named()
    x = torch.randn(4, 8, requires_grad=True)
    torch.manual_seed(1)
    module(x).sum().backward()
    expected, x.grad = x.grad, None
    seen = []
    states = torch.utils.checkpoint.get_device_states
    monkeypatch.setattr(torch.utils.checkpoint, "_get_device_module", lambda device: torch.cuda)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.utils.checkpoint, "get_device_states", lambda *args: seen.append(args) or states(*args))
    recompute_blocks(module, mode)
    torch.manual_seed(1)
    module(x).sum().backward()
    assert torch.equal(x.grad, expected)
    assert [any(value is x for value in args) for args in seen] == [True]
