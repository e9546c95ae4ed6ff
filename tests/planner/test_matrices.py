"""What is planned of whole matrices against what the real optimizer keeps, takes and sends."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.cases import case, in_full
from helpers.topologies import join
from torch import nn

from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.optim import CombinedOptimizer, MuonAdamW, OptimizerStateConfig, TiledOptimizer, flat_sizes
from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.optim.muon_adamw import hidden_matrices
from lightning_tex.optim.probe import Allocations
from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import parameter_shardings, shard_module
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.layouts import Candidate, Job, candidates
from lightning_tex.planner.optimizer_traffic import matrices_and_back
from lightning_tex.planner.optimizer_trial import describe_optimizer
from lightning_tex.planner.optimizers import OptimizerDescription
from lightning_tex.planner.states import FlatBuffers, state_bytes, tile_bytes
from lightning_tex.planner_trace.states import state_bytes as bytes_kept
from lightning_tex.strategy.precision import TexHalfPrecision, TexMixedPrecision, TexPrecision
from lightning_tex.testing.ranks import run_ranks

CONFIG = DecoderConfig(
    vocab_size=101, dim=64, num_layers=3, num_heads=8, num_kv_heads=4, hidden_dim=72, num_experts=4, top_k=2,
)  # fmt: skip
PLUGINS = {
    "32-true": TexPrecision(),
    "bf16-mixed": TexMixedPrecision("bf16-mixed", "cpu"),
    "bf16-true": TexHalfPrecision("bf16-true"),
}


def adafactor(model: nn.Module) -> CombinedOptimizer:
    matrices, rest = hidden_matrices(model)
    return CombinedOptimizer([torch.optim.Adafactor(matrices), torch.optim.SGD(rest)])


OPTIMIZERS = {"MuonAdamW": MuonAdamW, "Adafactor": adafactor}
# tensor, expert, expert_tensor; precision; ZeRO stage; optimizer
CASES = [
    ((2, 2, 2), "32-true", 1, "MuonAdamW"), ((2, 2, 1), "bf16-mixed", 2, "MuonAdamW"),
    ((1, 2, 1), "bf16-true", 1, "MuonAdamW"), ((4, 1, 4), "bf16-mixed", 1, "Adafactor"),
    ((2, 1, 2), "32-true", 0, "Adafactor"), ((1, 1, 1), "bf16-mixed", 1, "MuonAdamW"),
]  # fmt: skip

FEW = [CASES[1], CASES[4]]


def description(kind: str) -> OptimizerDescription:
    """Of the optimizer, with the groups that it makes of a decoder."""
    model = Decoder(CONFIG)
    optimizer = OPTIMIZERS[kind](model)
    places = {id(p): place for place, p in enumerate(model.parameters())}
    groups = tuple(tuple(places[id(p)] for p in group["params"]) for group in optimizer.param_groups)
    return describe_optimizer(optimizer, lambda _: groups)


def let_go_of_memory() -> None:
    """Gloo's threads hold what an all-to-all was of until they have looked for the next one: wait for them."""
    exchange = dist.all_to_all_single

    def waiting(*args: Any, **options: Any) -> Any:
        work = exchange(*args, **options)
        time.sleep(2e-3)
        return work

    dist.all_to_all_single = waiting


def seen(cases: list[Any]) -> list[dict[str, Any]]:
    """Of a step of each case on this rank: bytes kept, the most bytes for a while, all-to-alls and their bytes."""
    flat_sizes.SMALLEST_BUCKET = 4096  # several buffers of a kind
    let_go_of_memory()
    found = []
    for sizes, precision, stage, kind in cases:
        with case(sizes, precision, stage, kind):
            topology = join(*sizes)
            model = Decoder(CONFIG)
            shard_module(model, topology)
            PLUGINS[precision].convert_module(model)
            named = dict(model.named_parameters())
            shardings = {named[name]: one for name, one in parameter_shardings(model, topology).items()}
            config = PLUGINS[precision].state_config(OptimizerStateConfig(zero_stage=stage))
            optimizer = TiledOptimizer(OPTIMIZERS[kind](model), shardings, topology.world, config)
            allocations = Allocations()
            for step in range(2):
                optimizer.zero_grad()
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 0.1)
                optimizer.reduce_gradients()
                with topology.world.meter.measure() as meter:
                    meter.clear()
                    if step:
                        with allocations:
                            optimizer.step()
                    else:
                        optimizer.step()
                sent, calls = meter.sent_bytes(), meter.calls()
            found.append(
                {
                    "kept": bytes_kept(model, topology, optimizer),
                    "most": allocations.peak_bytes,
                    "sent": sent,
                    "calls": calls,
                }
            )
    return found


def compare(world: int, cases: list[Any]) -> None:
    by_rank = run_ranks(world, seen, cases)
    flat_sizes.SMALLEST_BUCKET, before = 4096, flat_sizes.SMALLEST_BUCKET
    try:
        for number, (sizes, precision, stage, kind) in enumerate(cases):
            layout = Layout(world, sizes[0], sizes[1], sizes[2])
            job = Job(describe_decoder(CONFIG), world, 16, world, precision, optimizer=description(kind))
            flat = FlatBuffers.of(job, candidate := Candidate(layout, zero_stage=stage))
            ranks = [rank[number] for rank in by_rank]
            planned = vars(state_bytes(flat, stage, "fp32", None, "cpu")).copy()
            planned["moments"] += planned.pop("scalars")
            fullest = max((rank["kept"] for rank in ranks), key=lambda kept: sum(kept.values()))
            assert fullest == planned
            shared = sum(planned[name] for name in ("master", "moments"))
            for rank in ranks:  # nobody keeps much less than the fullest
                assert rank["kept"]["master"] + rank["kept"]["moments"] > 0.8 * shared
            temporary = max(rank["most"] for rank in ranks)
            assert temporary <= tile_bytes(flat, "fp32", None, "cpu", stage) <= 1.5 * temporary
            expected = matrices_and_back(flat, candidate, "cpu")
            for axis in {each.axis for each in expected}:
                each = Sent("all_to_all", axis, "optimizer")
                mean = sum(Fraction(rank["sent"][each]) for rank in ranks) / world
                assert mean == sum(e.times * e.sent_bytes for e in expected if e.axis == axis)
                assert {rank["calls"][each] for rank in ranks} == {sum(e.times for e in expected if e.axis == axis)}
    finally:
        flat_sizes.SMALLEST_BUCKET = before


@pytest.mark.parametrize("cases", in_full([CASES, FEW], [FEW]), ids=len)
def test_what_matrices_take_is_what_is_planned(cases: list[Any]) -> None:
    compare(4, cases)


def test_formats_that_whole_matrices_do_not_have_are_not_planned() -> None:
    job = Job(describe_decoder(CONFIG), 4, 16, 4, "bf16-mixed", optimizer=description("MuonAdamW"))
    assert {candidate.optimizer_state_format for candidate in candidates(job)} == {"fp32"}


def test_products_of_a_step_are_those_of_muon() -> None:
    matrix = nn.Parameter(torch.zeros(24, 40))
    optimizer = torch.optim.Muon([matrix])
    costs = MatrixCosts(optimizer, optimizer.param_groups[0]).of((24, 40), torch.float32)
    assert costs.flops == 5 * (2 * 2 * 24 * 24 * 40 + 2 * 24**3)
    assert costs.states == 4 * 24 * 40 and not costs.numbers and not costs.further
