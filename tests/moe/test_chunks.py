"""A batch in chunks: the numbers of one, what runs beside what, and the same when recomputed."""

import itertools

import pytest
import torch
from helpers.cases import case
from helpers.topologies import join
from torch import nn

from lightning_tex.layers import ParallelMLP
from lightning_tex.moe import MoE, auxiliary_loss, exchange
from lightning_tex.moe.expert_block import RowsAtOnce
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, TOP_K = 6, 8, 2
# tensor, expert, expert_tensor, split duplicates
LAYOUTS = [(1, 4, 1, True), (2, 2, 2, True), (2, 2, 2, False), (2, 4, 1, True), (1, 2, 1, True), (4, 1, 4, True)]
LAYERS = {
    "dropless": {},
    "capacity": {"capacity_factor": 0.8},
    "rounds": {"round_factor": 1.0},
    "one round": {"round_factor": 8.0},
}


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mlp = MoE(DIM, 8, EXPERTS, TOP_K, activation="swiglu", **options)
        self.shared = ParallelMLP(DIM, 4)
        self.beside = True

    def forward(self, x, mask=None):
        if self.beside:
            return x + self.mlp(x, mask, beside=self.shared).sin()
        return x + (self.mlp(x, mask) + self.shared(x)).sin()


def built(topology, mode=None, **options):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(**options)]).double()
    with torch.no_grad():
        model.blocks[0].mlp.router.weight[:2] += 0.5  # uneven
    shard_module(model, topology)
    recompute_blocks(model, mode)
    return model


def step(topology, mode=None, beside=True, **options):
    """Loss and gradients."""
    model = built(topology, mode, **options)
    model.blocks[0].beside = beside
    torch.manual_seed(1 + topology.data.rank)
    sequence = topology.communication.sequence_parallel
    x = torch.randn(3, 8, DIM, dtype=torch.float64)
    mask = torch.rand(3, 8) < 0.8
    if sequence:
        x = x.chunk(topology.tensor.size, 1)[topology.tensor.rank].contiguous()
    x.requires_grad_()
    loss = model.blocks[0](x, mask).square().sum() + auxiliary_loss(model)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())]


def chunks_against_one(layouts, modes):
    for layout, sequence in itertools.product(layouts, (False, True)):
        if sequence and layout[0] == 1:
            continue
        for name, options in LAYERS.items():
            with case(layout, name, sequence=sequence):
                expected = step(join(*layout, sequence_parallel=sequence), beside=False, **options)
                for chunks in (2, 5):
                    topology = join(*layout, sequence_parallel=sequence, expert_chunks=chunks)
                    found = step(topology, **options)
                    for ours, theirs in zip(found, expected, strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
                    for mode in modes:
                        again = step(topology, mode, **options)
                        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), (mode, chunks)


def test_chunks_and_a_branch_beside_them_give_the_numbers_of_one_after_the_other():
    run_ranks(4, chunks_against_one, LAYOUTS[1:2], ("communication_aware",))


@pytest.mark.full
def test_chunks_on_every_layout():
    run_ranks(4, chunks_against_one, LAYOUTS, ("full", "communication_aware"))


# --- what runs beside what


class Watched:
    """Notes when all-to-alls of rows begin and are waited for, and when products are computed."""

    def __init__(self, monkeypatch):
        self.seen, self._number = [], 0
        start = exchange.start_all_to_all

        def started(x, *args, **kwargs):
            under_way = start(x, *args, **kwargs)
            return under_way if x.shape[-1] == 1 else self._waited(under_way)

        monkeypatch.setattr(exchange, "start_all_to_all", started)
        for name in ("inward", "outward", "inner_backward"):
            monkeypatch.setattr(RowsAtOnce, name, self._noted(name, getattr(RowsAtOnce, name)))

    def _waited(self, under_way):
        self._number += 1
        number, seen = self._number, self.seen
        seen.append(f"start {number}")

        class UnderWay:
            def wait(self):
                seen.append(f"wait {number}")
                return under_way.wait()

        return UnderWay()

    def _noted(self, name, function):
        def noted(*args, **kwargs):
            self.seen.append(name)
            return function(*args, **kwargs)

        return noted

    def branch(self, x):
        self.seen.append("branch")
        x.register_hook(lambda _: self.seen.append("branch backward"))
        return x


def watched(chunks):
    with pytest.MonkeyPatch.context() as monkeypatch:
        layer = MoE(DIM, 8, EXPERTS, TOP_K, load_balance_coefficient=0).double()
        shard_module(layer, join(1, 2, expert_chunks=chunks))
        seen = Watched(monkeypatch)
        x = torch.randn(16, DIM, dtype=torch.float64, requires_grad=True)
        y = layer(x, beside=lambda x: seen.branch(x * 2))
        forward, seen.seen, seen._number = seen.seen, [], 0
        y.sum().backward()
        return forward, seen.seen


def test_a_chunk_travels_while_another_is_computed():
    forward = [
        "start 1", "start 2", "wait 1", "inward", "outward", "start 3",  # the first leaves while the second comes
        "wait 2", "inward", "outward", "start 4", "wait 3", "branch", "wait 4",
    ]  # fmt: skip
    backward = [
        "start 1", "branch backward", "start 2", "wait 1", "inner_backward", "start 3",
        "wait 2", "inner_backward", "start 4", "wait 3", "wait 4",
    ]  # fmt: skip
    assert run_ranks(2, watched, 2) == [(forward, backward)] * 2


def test_without_chunks_only_a_branch_runs_beside():
    forward = ["start 1", "wait 1", "inward", "outward", "start 2", "branch", "wait 2"]
    backward = ["start 1", "branch backward", "wait 1", "inner_backward", "start 2", "wait 2"]
    assert run_ranks(2, watched, 1) == [(forward, backward)] * 2
