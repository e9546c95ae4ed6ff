"""The byte meter against formulas, and against a wrapper around torch.distributed itself: equal, not close."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import ceil

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from topologies import join
from torch import nn

from lightning_tex import collectives, placement
from lightning_tex.layers import ParallelAttention
from lightning_tex.moe import MoE, auxiliary_loss
from lightning_tex.moe.travel import Lanes
from lightning_tex.optim import TiledOptimizer
from lightning_tex.recompute import recompute
from lightning_tex.topology import AXES

# B sequences x S positions = T tokens, D model width, E experts, k choices, F capacity factor; fp32, int64 indices
B, S, D, E, K, F = 3, 5, 16, 8, 2, 1.25
T = B * S
LAYOUTS = ((2, 2, 2, True), (2, 2, 2, False), (2, 4, 1, True), (4, 1, 4, True), (4, 2, 1, True), (1, 4, 1, True))


class Block(nn.Module):
    """Attention, then capacity MoE: the last collective of the forward brings tokens home."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.moe = ParallelAttention(D, 4), MoE(D, 24, E, K, F)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.moe(x)


def ring(operation: str, n: int, size: int) -> Fraction:
    return Fraction((2 if operation == "all_reduce" else 1) * (n - 1) * size, n)


def formulas(topology, mode: str | None, fused: bool) -> dict[tuple[str, str, str], Fraction]:
    """Bytes of one forward and backward of one block by (operation, axis, pass)."""
    t, e, d = topology.tensor.size, topology.expert.size, topology.data.size
    split = t if topology.communication.split_duplicates else 1
    cut = topology.expert_tensor.size
    gather = cut if topology.communication.split_duplicates else 1
    rows = -(-ceil(F * K * T / E) // split) * split
    buffer = 4 * E * rows * D  # [E, C, D]
    sent: dict[tuple[str, str, str], Fraction] = {}

    def add(operation: str, axis: str, n: int, size: int, *during: str) -> None:
        for one in during:
            if n > 1:
                sent[operation, axis, one] = sent.get((operation, axis, one), Fraction(0)) + ring(operation, n, size)

    def out(*during: str) -> None:
        add("all_to_all", "expert", e, buffer // split, *during)
        add("all_gather", "expert_tensor", gather, buffer // split * gather, *during)

    def home(*during: str) -> None:
        arrived = buffer // split * gather
        if gather > 1 and fused:
            add("reduce_scatter", "expert_tensor", gather, arrived, *during)
        else:
            add("all_reduce", "expert_tensor", cut, arrived, *during)
        add("all_to_all", "expert", e, buffer // split, *during)
        add("all_gather", "tensor", split, buffer, *during)

    forward = ("forward", "recompute") if mode == "full" else ("forward",)
    add("all_reduce", "tensor", t, 4 * T * D, *forward)  # out of the attention
    add("all_reduce", "tensor", t, 4 * T * D, "backward")  # into it
    add("broadcast", "tensor", t, 8 * T * K, *forward)
    if e > 1:
        for one in forward:
            sent["exchange_counts", "expert", one] = Fraction(2 * (e - 1) * 8, e)
    out(*forward, "backward")
    home(*forward, "backward")
    add("all_reduce", "data", d, 4 * (2 * E + 2), "forward")  # the loss is not computed again
    return sent


class Overheard:
    """Counts what passes through torch.distributed, by the process group it is given."""

    def __init__(self, topology, monkeypatch) -> None:
        self.bytes: dict[tuple[int, ...], Fraction] = {}
        axes = {id(axis.group): axis for axis in map(topology.axis, AXES)}
        real = dist.all_reduce, dist.broadcast, dist.all_to_all_single
        gather = collectives._all_gather_single

        def hear(group, scaled: int) -> None:
            axis = axes[id(group)]
            self.bytes[axis.ranks] = self.bytes.get(axis.ranks, Fraction(0)) + Fraction(scaled, axis.size)

        def size(x: torch.Tensor) -> int:
            return x.numel() * x.element_size()

        def all_reduce(x, op, group):
            hear(group, 2 * (dist.get_world_size(group) - 1) * size(x))
            return real[0](x, op=op, group=group)

        def broadcast(x, src, group):
            hear(group, (dist.get_world_size(group) - 1) * size(x))
            return real[1](x, src=src, group=group)

        def all_to_all(out, x, to=None, leave=None, group=None, async_op=False):
            n, me = dist.get_world_size(group), dist.get_rank(group)
            parts = leave or [x.shape[0] // n] * n
            others = sum(size(part) for rank, part in enumerate(x.split(parts)) if rank != me)
            hear(group, n * others)
            return real[2](out, x, to, leave, group=group, async_op=async_op)

        def all_gather(out, x, group):
            hear(group, (dist.get_world_size(group) - 1) * size(out))
            return gather(out, x, group=group)

        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        monkeypatch.setattr(dist, "broadcast", broadcast)
        monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
        monkeypatch.setattr(collectives, "_all_gather_single", all_gather)


def one_pass(topology, mode, fused, module=Block, x=None):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([module()])
    placement.cut(model, topology)
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        lanes = moe.dispatcher.lanes
        lanes = Lanes(lanes.expert, lanes.split, lanes.gather, lanes.cut, fused)
        moe.dispatcher = type(moe.dispatcher)(**{**vars(moe.dispatcher), "lanes": lanes})
    recompute(model, mode)
    torch.manual_seed(topology.data.rank)
    x = (torch.randn(B, S, D) if x is None else x).requires_grad_()
    with topology.world.meter.measure() as meter:
        meter.clear()
        (model.blocks[0](x).square().sum() + auxiliary_loss(model)).backward()
    return meter


def against_formulas():
    for layout in LAYOUTS:
        topology = join(*layout)
        for mode in (None, "full", "communication_aware"):
            for fused in (True, False):
                meter = one_pass(topology, mode, fused)
                counted = {tuple(kind): Fraction(sent) for kind, sent in meter.sent_bytes().items()}
                assert counted == formulas(topology, mode, fused), (layout, mode, fused)


def test_counts_equal_the_formulas():
    run_ranks(4, against_formulas)


# --- sequence parallelism. Every token goes to every expert, so that counts are known: k = E, nothing overflows.

EVEN = 8  # positions, which 2 and 4 tensor ranks divide


class Everywhere(Block):
    def __init__(self, capacity_factor: float | None) -> None:
        super().__init__()
        self.moe = MoE(D, 24, E, E, capacity_factor)


def split_formulas(topology, mode: str | None, fused: bool, capacity: bool) -> dict[tuple[str, str, str], Fraction]:
    """Bytes of one forward and backward of one block whose tokens are split over tensor."""
    t, e, d, g = (topology.axis(axis).size for axis in ("tensor", "expert", "data", "expert_tensor"))
    whole, rows = 4 * B * EVEN * D, B * EVEN // t * E  # bytes of the stream; choices of the own tokens
    sent: dict[tuple[str, str, str], Fraction] = {}

    def add(operation: str, axis: str, n: int, size: int, *during: str, count: str | None = None) -> None:
        for one in during:
            if n > 1:
                key = count or operation, axis, one
                sent[key] = sent.get(key, Fraction(0)) + ring(operation, n, size)

    def out(*during: str) -> None:
        add("all_to_all", "expert", e, 4 * rows * D, *during)
        add("all_gather", "expert_tensor", g, g * 4 * rows * D, *during)

    def home(*during: str) -> None:
        add("reduce_scatter" if fused else "all_reduce", "expert_tensor", g, g * 4 * rows * D, *during)
        add("all_to_all", "expert", e, 4 * rows * D, *during)

    forward = ("forward", "recompute") if mode == "full" else ("forward",)
    for first, second in (("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")):  # into attention, out
        add(first, "tensor", t, whole, *forward)
        add(second, "tensor", t, whole, "backward")
    if capacity:
        add("all_gather", "tensor", t, t * 8 * E * B * (E + 1), *forward, count="exchange_counts")
    add("all_to_all", "expert", e, 8 * E, *forward, count="exchange_counts")
    add("all_gather", "expert_tensor", g, g * 8 * E, *forward, count="exchange_counts")
    out(*forward, "backward")
    home(*forward, "backward")
    for axis, n in (("tensor", t), ("data", d)):  # the loss is not computed again
        add("all_reduce", axis, n, 4 * (2 * E + 2), "forward")
    return sent


def split_against_formulas():
    for layout in LAYOUTS:
        topology = join(*layout, sequence_parallel=True)
        for mode in (None, "full", "communication_aware"):
            for fused, factor in ((True, None), (True, 1.0), (False, 1.0)):
                x = torch.randn(B, EVEN // topology.tensor.size, D)
                meter = one_pass(topology, mode, fused, lambda factor=factor: Everywhere(factor), x)
                counted = {tuple(kind): Fraction(sent) for kind, sent in meter.sent_bytes().items()}
                expected = split_formulas(topology, mode, fused, factor is not None)
                assert counted == expected, (layout, mode, fused, factor)


def test_counts_of_sequence_parallelism_equal_the_formulas():
    run_ranks(4, split_against_formulas)


# --- the optimizer's pass


def step_against_formulas():
    for layout in LAYOUTS:
        for sequence in (False, True):
            topology = join(*layout, sequence_parallel=sequence)
            torch.manual_seed(0)
            model = Block()
            placement.cut(model, topology)
            parameters = dict(model.named_parameters())
            placed = {parameters[name]: p for name, p in placement.placements(model, topology).items()}
            optimizer = TiledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), placed, topology.world)
            kinds = {"cut": 0, "uncut": 0, "expert": 0}  # elements, each parameter aligned to 64
            for name, parameter in parameters.items():
                kind = "expert" if "experts" in name else "uncut" if "router" in name else "cut"
                kinds["cut" if topology.tensor.size == 1 and kind == "uncut" else kind] += aligned(parameter.numel())
            t = topology.tensor.size
            sent: dict[str, Fraction] = {}
            for kind, elements in kinds.items():
                axis = topology.expert_data if kind == "expert" else topology.data
                shard = aligned(-(-elements // axis.size))
                if elements and axis.size > 1:
                    for operation in ("reduce_scatter", "all_gather"):
                        key = f"{operation}/{axis.name}"
                        sent[key] = sent.get(key, Fraction(0)) + ring(operation, axis.size, 4 * shard * axis.size)
                if kind == "uncut" and elements and sequence and t > 1:
                    sent["all_reduce/tensor"] = ring("all_reduce", t, 4 * shard)
            sent["all_reduce/world"] = ring("all_reduce", 4, 16)  # the norm, and whether all is finite
            with topology.world.meter.measure() as meter:
                meter.clear()
                optimizer.clip_by_norm(1.0)
                optimizer.step()
            assert {kind.during for kind in meter.calls()} == {"optimizer"}
            counted = {f"{kind.operation}/{kind.axis}": Fraction(sent) for kind, sent in meter.sent_bytes().items()}
            assert counted == sent, (layout, sequence)


def aligned(elements: int) -> int:
    return -(-elements // 64) * 64


def test_counts_of_a_step_equal_the_formulas():
    run_ranks(4, step_against_formulas)


class Dropless(Block):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(D, 24, E, K)


def against_torch():
    for layout, sequence in itertools.product(LAYOUTS, (False, True)):
        topology = join(*layout, sequence_parallel=sequence)
        for module in (Block, Dropless):
            for mode in (None, "full", "communication_aware"):
                with pytest.MonkeyPatch.context() as monkeypatch:
                    overheard = Overheard(topology, monkeypatch)
                    meter = one_pass(topology, mode, True, module)
                counted: dict[tuple[int, ...], Fraction] = {}  # by ranks: axes of the same ranks share a group
                for kind, sent in meter.sent_bytes().items():
                    ranks = topology.axis(kind.axis).ranks
                    counted[ranks] = counted.get(ranks, Fraction(0)) + Fraction(sent)
                assert counted == overheard.bytes, (layout, module, mode)


def test_counts_equal_what_passes_through_torch():
    run_ranks(4, against_torch)


def counts_nothing_when_off():
    topology = join(2, 2, 2, True)
    meter = topology.world.meter
    meter.clear()
    collectives.all_reduce(torch.ones(3), topology.tensor)
    assert meter.calls() == {} and meter.sent_bytes() == {}
    with meter.measure():
        collectives.all_reduce(torch.ones(3), topology.tensor)
        with meter.optimizer_pass():
            collectives.gather_in_place(torch.ones(4), topology.data).wait()
    return {tuple(kind): (calls, meter.sent_bytes()[kind]) for kind, calls in meter.calls().items()}


def test_off_by_default_and_by_pass():
    for counted in run_ranks(4, counts_nothing_when_off):
        assert counted == {
            ("all_reduce", "tensor", "forward"): (1, 12.0),
            ("all_gather", "data", "optimizer"): (1, 8.0),
        }
