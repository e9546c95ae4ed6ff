"""The byte meter against formulas, and against a wrapper around torch.distributed itself: equal, not close."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.backwards import announced_backward
from helpers.cases import case, pairwise
from helpers.own_modules import FEATURES, TwoKinds, regression
from helpers.topologies import join
from torch import nn

from lightning_tex.layers import ParallelAttention, VocabParallelLinearCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import MoE, auxiliary_loss, step_is_over
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer, flat_sizes
from lightning_tex.optim.overlap import optimizer_pass
from lightning_tex.parallel import collectives, in_place_collectives, transport
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.byte_meter import ByteMeter, Sent
from lightning_tex.parallel.layout import AXES
from lightning_tex.parallel.sharding import parameter_shardings, shard_module
from lightning_tex.planner.collective import sent_bytes
from lightning_tex.planner.describe import describe, describe_decoder
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.traffic import micro_step, step_collectives
from lightning_tex.testing.ranks import run_ranks

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


def formulas(topology, mode: str | None, fused: bool, module=Block, length=S) -> dict[Sent, Fraction]:
    """Bytes of one forward and backward of one block, as the planner has them."""
    communication = replace(topology.communication, fused=fused)
    model = nn.Module()
    with torch.device("meta"):
        model.blocks = nn.ModuleList([module()])
    layout = topology.layout
    job = Job(describe(model, input_gradient=True), layout.world, length, B * layout.data, "32-true")
    candidate = Candidate(layout, B, activation_checkpointing=mode, communication=communication)
    return sent_bytes(micro_step(job, candidate))


class Overheard:
    """Counts what passes through torch.distributed, by the process group it is given."""

    def __init__(self, topology, monkeypatch) -> None:
        self.bytes: dict[tuple[int, ...], Fraction] = {}
        axes = {id(axis.group): axis for axis in map(topology.axis, AXES)}
        real = dist.all_reduce, dist.broadcast, dist.all_to_all_single
        gather = transport._all_gather

        def hear(group, scaled: int) -> None:
            axis = axes[id(group)]
            self.bytes[axis.ranks] = self.bytes.get(axis.ranks, Fraction(0)) + Fraction(scaled, axis.size)

        def size(x: torch.Tensor) -> int:
            return x.numel() * x.element_size()

        def all_reduce(x, op, group, async_op=False):
            hear(group, 2 * (dist.get_world_size(group) - 1) * size(x))
            return real[0](x, op=op, group=group, async_op=async_op)

        def broadcast(x, src, group):
            hear(group, (dist.get_world_size(group) - 1) * size(x))
            return real[1](x, src=src, group=group)

        def all_to_all(out, x, to=None, leave=None, group=None, async_op=False):
            n, me = dist.get_world_size(group), dist.get_rank(group)
            parts = leave or [x.shape[0] // n] * n
            others = sum(size(part) for rank, part in enumerate(x.split(parts)) if rank != me)
            hear(group, n * others)
            return real[2](out, x, to, leave, group=group, async_op=async_op)

        def all_gather(out, x, group, async_op=False):
            hear(group, (dist.get_world_size(group) - 1) * size(out))
            return gather(out, x, group=group, async_op=async_op)

        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        monkeypatch.setattr(dist, "broadcast", broadcast)
        monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
        monkeypatch.setattr(transport, "_all_gather", all_gather)
        monkeypatch.setattr(transport, "shared_memory", lambda group: None)


def one_pass(topology, mode, fused, module=Block, x=None):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([module()])
    shard_module(model, topology)
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        moe.dispatcher = replace(moe.dispatcher, axes=replace(moe.dispatcher.axes, fused=fused))
    recompute_blocks(model, mode)
    torch.manual_seed(topology.data.rank)
    x = (torch.randn(B, S, D) if x is None else x).requires_grad_()
    with topology.world.meter.measure() as meter:
        meter.clear()
        (model.blocks[0](x).square().sum() + auxiliary_loss(model)).backward()
    return meter


MODES = (None, "full", "communication_aware")


def few_or_every(*factors):
    """The cases that cover all pairs by default, and all of them in full."""
    every = pytest.param(list(itertools.product(*factors)), marks=pytest.mark.full, id="every")
    return pytest.mark.parametrize("cases", [pytest.param(pairwise(*factors), id="pairs"), every])


def against_formulas(cases):
    for layout, mode, fused, chunks in cases:
        with case(layout, mode=mode, fused=fused, chunks=chunks):
            topology = join(*layout, expert_chunks=chunks)
            meter = one_pass(topology, mode, fused)
            counted = {kind: Fraction(sent) for kind, sent in meter.sent_bytes().items()}
            assert counted == formulas(topology, mode, fused)


@few_or_every(LAYOUTS, MODES, (True, False), (1, 2))
def test_counts_equal_the_formulas(cases):
    run_ranks(4, against_formulas, cases)


# --- sequence parallelism. Every token goes to every expert, so that counts are known: k = E, nothing overflows.

EVEN = 8  # positions, which 2 and 4 tensor ranks divide


class Everywhere(Block):
    def __init__(self, capacity_factor: float | None, round_factor: float | None = None) -> None:
        super().__init__()
        self.moe = MoE(D, 24, E, E, capacity_factor, round_factor=round_factor)


def split_against_formulas(cases):
    for layout, mode, (fused, *factors), chunks in cases:
        with case(layout, mode=mode, fused=fused, factors=factors, chunks=chunks):
            topology = join(*layout, sequence_parallel=True, expert_chunks=chunks)
            x = torch.randn(B, EVEN // topology.tensor.size, D)
            meter = one_pass(topology, mode, fused, partial(Everywhere, *factors), x)
            counted = {kind: Fraction(sent) for kind, sent in meter.sent_bytes().items()}
            assert counted == formulas(topology, mode, fused, partial(Everywhere, *factors), EVEN)


@few_or_every(LAYOUTS, MODES, ((True, None), (True, 1.0), (False, 1.0), (True, None, 1.0)), (1, 2))
def test_counts_of_sequence_parallelism_equal_the_formulas(cases):
    run_ranks(4, split_against_formulas, cases)


# --- modules of the user's own: linear layers, wrapped experts of two sizes, plain layers; a token is a sample


def without_rows(sent: dict[Sent, Fraction]) -> dict[Sent, Fraction]:
    """What does not depend on which experts are chosen."""
    rows = {"expert", "expert_tensor"}
    return {kind: n for kind, n in sent.items() if kind.axis not in rows or kind.operation == "exchange_counts"}


def own_modules_against_formulas():
    seen, tokens = 0, 24
    for layout, build in itertools.product(((1, 4, 1, True), *LAYOUTS), (regression, TwoKinds)):
        topology = join(*layout)
        torch.manual_seed(0)
        model = build()
        description = describe(model)
        try:
            description.check(topology.layout)
        except ValueError:  # a layer of the module that cannot be sharded so
            continue
        shard_module(model, topology)
        x = torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(topology.data.rank))
        with topology.world.meter.measure() as meter:
            meter.clear()
            (model(x).square().mean() + auxiliary_loss(model)).backward()
        job = Job(description, topology.layout.world, 1, tokens * topology.layout.data, "32-true")
        expected = micro_step(job, Candidate(topology.layout, tokens, communication=topology.communication))
        counted = {kind: Fraction(sent) for kind, sent in meter.sent_bytes().items()}
        planned = sent_bytes(expected)
        if build is regression:  # how many rows its router sends to each expert is not known
            counted, planned = map(without_rows, (counted, planned))
        assert counted == planned and planned, (layout, build)
        seen += 1
    return seen


def test_counts_of_own_modules_equal_the_formulas():
    assert min(run_ranks(4, own_modules_against_formulas)) >= 10


# --- the whole step: embedding, dense and MoE blocks, head, cross-entropy, and the optimizer's pass

# A vocabulary that 4 does not divide; heads shared by two. Every token to every expert where routing is not static.
DECODERS = (
    DecoderConfig(98, D, 3, 8, 4, 24, 64, E, K, F, activation="gelu", tie_embeddings=False),
    DecoderConfig(98, D, 2, 8, 4, 24, 64, E, E, None, head_dim=6, qk_norm="head", expert_hidden_dim=16),
    DecoderConfig(98, D, 2, 8, 4, 24, 64, E, E, 1.0, moe_every=1, load_balance_coefficient=0, qk_norm="full",
                  shared_expert_hidden_dim=12, shared_expert_gate=True),
    DecoderConfig(98, D, 2, 8, 8, 24, 64, E, E, None, kv_lora_rank=6, q_lora_rank=10, qk_nope_head_dim=4,
                  qk_rope_head_dim=2, v_head_dim=3, shared_expert_hidden_dim=12),
)  # fmt: skip
SIZES = {"vocab_size": 98, "dim": D, "num_layers": 2, "num_heads": 8, "hidden_dim": 24, "num_experts": E}
STEPS = ((0, None, 1), (1, "full", 2), (2, "communication_aware", 2))  # ZeRO stage, recomputation, micro-steps


def training_step(model, topology, mode, stage, micro_steps):
    """One optimizer step of a decoder, as the strategy takes it."""
    torch.manual_seed(0)
    shard_module(model, topology)
    recompute_blocks(model, mode)
    parameters = dict(model.named_parameters())
    placed = {parameters[name]: p for name, p in parameter_shardings(model, topology).items()}
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrix]} for matrix in (True, False)]
    optimizer = TiledOptimizer(
        torch.optim.AdamW(groups), placed, topology.world, OptimizerStateConfig(zero_stage=stage)
    )
    cross_entropy = VocabParallelLinearCrossEntropy()
    cross_entropy.bind(topology)
    with topology.world.meter.measure() as meter:
        meter.clear()
        for _ in range(micro_steps):
            ids = torch.randint(98, (B, EVEN), generator=torch.Generator().manual_seed(topology.data.rank))
            loss = cross_entropy(model.hidden(ids), model.head, ids) + auxiliary_loss(model)
            announced_backward(optimizer, loss)
        optimizer.clip_by_norm(1.0)
        optimizer.step()
        with optimizer_pass(topology.world):
            step_is_over(model)
    return meter


def overflow_is_known(layout, config, sequence, *others):
    """Whether sizes tell what overflows."""
    return not (sequence and config.capacity_factor == F)


def steps_against_formulas(cases):
    flat_sizes.SMALLEST_BUCKET = 2048  # several buffers of a kind
    for layout, config, sequence, step, chunks in cases:
        with case(layout, config, sequence=sequence, step=step, chunks=chunks):
            step_against_formulas(layout, config, sequence, chunks, *step)


def step_against_formulas(layout, config, sequence, chunks, stage, mode, micro_steps):
    topology = join(*layout, sequence_parallel=sequence, expert_chunks=chunks)
    meter = training_step(Decoder(config), topology, mode, stage, micro_steps)
    world = topology.layout.world
    job = Job(describe_decoder(config), world, EVEN, B * topology.data.size * micro_steps, "32-true")
    candidate = Candidate(topology.layout, B, micro_steps, stage, mode, "fp32", topology.communication)
    expected = step_collectives(job, candidate)
    counted = {kind: Fraction(sent) for kind, sent in meter.sent_bytes().items()}
    assert counted == sent_bytes(expected)
    calls: dict[Sent, int] = {}
    for each in expected:
        calls[each.key] = calls.get(each.key, 0) + each.times
    assert meter.calls() == calls


def test_bytes_and_calls_of_a_step_equal_the_planners():
    cases = pairwise(LAYOUTS, DECODERS, (False, True), STEPS, (1, 3), legal=overflow_is_known)
    cases.append((LAYOUTS[0], DECODERS[3], False, STEPS[1], 1))  # where a recomputation ends with a shared expert
    run_ranks(4, steps_against_formulas, cases)


@pytest.mark.parametrize(
    "dense",
    [
        {"shared_expert_hidden_dim": 12},
        {"shared_expert_hidden_dim": 12, "shared_expert_gate": True},
        {"residual_hidden_dim": 12},
    ],
    ids=str,
)
def test_a_dense_mlps_result_is_summed_again_only_where_it_is_kept(dense):
    config = DecoderConfig(98, D, 1, 8, 4, 24, 64, E, K, F, 1, **dense)
    run_ranks(2, step_against_formulas, (2, 1, 2, True), config, False, 1, 1, "full", 1)


class OwnExpert(torch.nn.Linear):
    def __init__(self, dim, hidden_dim):
        super().__init__(dim, dim)


@pytest.mark.parametrize("mode", ["communication_aware", pytest.param("full", marks=pytest.mark.full)])
def test_experts_of_ones_own_send_what_the_others_send(mode):
    config = DecoderConfig(98, D, 2, 8, 4, 24, 64, E, K, F, 1, expert_module=OwnExpert)
    run_ranks(4, step_against_formulas, (2, 4, 1, True), config, False, 2, 1, mode, 2)


@pytest.mark.full
def test_bytes_and_calls_of_every_step_equal_the_planners():
    more = (1, 1, 1, True), (2, 1, 2, True), (1, 2, 1, False)
    every = itertools.product((*LAYOUTS, *more), DECODERS, (False, True), STEPS, (1, 3))
    run_ranks(4, steps_against_formulas, [values for values in every if overflow_is_known(*values)], timeout=600)


# Every token to every expert, but for GShard's two, of which a capacity makes buffers of known sizes.
ROUTED = {
    "bias": {"router": {"name": "sigmoid", "init_args": {"bias_update_rate": 0.1}}},
    "losses": {"sequence_balance_coefficient": 0.1, "entropy_coefficient": 0.1, "step_balance_coefficient": 0.1},
    "sinkhorn": {"router": {"name": "sinkhorn", "init_args": {"iterations": 3}}},
    "overflow by score": {"capacity_factor": 1.0, "overflow_by": "score", "min_capacity": 2},
    "hash": {"router": "hash"},
    "forced balance": {"router": "forced_balance"},
    "expert choice": {"router": "expert_choice"},
    "expert choice of the batch": {"router": {"name": "expert_choice", "init_args": {"within": "batch"}}},
    "gshard": {"router": "gshard", "top_k": 2, "capacity_factor": F},
    "experts that compute nothing": {
        "zero_experts": 1,
        "identity_experts": 2,
        "capacity_factor": F,
        "sequence_balance_coefficient": 0.1,
        "router": {"name": "sigmoid", "init_args": {"bias_update_rate": 0.1}},
        "top_k": 2,
    },
}


def routers_against_formulas(cases):
    for layout, name, sequence, step in cases:
        config = DecoderConfig(**{"top_k": E, **SIZES, **ROUTED[name]})
        with case(layout, name, sequence=sequence, step=step):
            step_against_formulas(layout, config, sequence, 1, *step)


def rows_are_known(layout, name, sequence, step):
    return not (sequence and name in ("gshard", "experts that compute nothing"))


@pytest.mark.parametrize(
    ("layouts", "steps"),
    [(LAYOUTS[:1], STEPS[1:2]), pytest.param(LAYOUTS, STEPS, marks=pytest.mark.full)],
    ids=["one layout", "all"],
)
def test_bytes_and_calls_of_routers_equal_the_planners(layouts, steps):
    cases = itertools.product(layouts, ROUTED, (False, True), steps)
    run_ranks(4, routers_against_formulas, [values for values in cases if rows_are_known(*values)])


class Dropless(Block):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(D, 24, E, K)


def by_ranks(topology, meter):
    """Axes of the same ranks share a group."""
    counted: dict[tuple[int, ...], Fraction] = {}
    for kind, sent in meter.sent_bytes().items():
        ranks = topology.axis(kind.axis).ranks
        counted[ranks] = counted.get(ranks, Fraction(0)) + Fraction(sent)
    return counted


def against_torch(cases):
    for layout, sequence, module, mode, chunks in cases:
        with case(layout, module.__name__, sequence=sequence, mode=mode, chunks=chunks):
            topology = join(*layout, sequence_parallel=sequence, expert_chunks=chunks)
            with pytest.MonkeyPatch.context() as monkeypatch:
                overheard = Overheard(topology, monkeypatch)
                meter = one_pass(topology, mode, True, module)
            assert by_ranks(topology, meter) == overheard.bytes


@few_or_every(LAYOUTS, (False, True), (Block, Dropless), MODES, (1, 2))
def test_counts_equal_what_passes_through_torch(cases):
    run_ranks(4, against_torch, cases)


def counts_nothing_when_off():
    topology = join(2, 2, 2, True)
    meter = topology.world.meter
    meter.clear()
    collectives.all_reduce(torch.ones(3), topology.tensor)
    assert meter.calls() == {} and meter.sent_bytes() == {}
    with meter.measure():
        collectives.all_reduce(torch.ones(3), topology.tensor)
        with meter.optimizer_pass():
            in_place_collectives.gather_in_place(torch.ones(4), topology.data).wait()
    return {tuple(kind): (calls, meter.sent_bytes()[kind]) for kind, calls in meter.calls().items()}


def test_off_by_default_and_by_pass():
    for counted in run_ranks(4, counts_nothing_when_off):
        assert counted == {
            ("all_reduce", "tensor", "forward"): (1, 12.0),
            ("all_gather", "data", "optimizer"): (1, 8.0),
        }


def test_start_forgets_what_was_counted_and_stop_keeps_it() -> None:
    meter, kind = ByteMeter(), Sent("all_reduce", "tensor", "forward")
    meter.add(kind, 24, 2)
    assert not meter.counting and meter.calls() == {}
    for _ in range(2):
        meter.start()
        assert meter.counting
        meter.add(kind, 24, 2)
        meter.stop()
        meter.add(kind, 24, 2)
        assert (meter.calls(), meter.sent_bytes()) == ({kind: 1}, {kind: 12.0})
