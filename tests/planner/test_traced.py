"""Traced activations: those of a decoder against the declared formulas, those of other modules against real steps."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.backwards import announced_backward
from helpers.cases import case
from helpers.own_modules import FEATURES, TwoKinds, regression
from helpers.topologies import join
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_tex import LanguageModel
from lightning_tex.bench.memory import peak_bytes
from lightning_tex.layers import ColumnParallelLinear, ParallelMLP, RMSNorm, RowParallelLinear
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import MoE, Router, auxiliary_loss
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.optim.probe import Allocations
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.sharding import parameter_shardings, shard_module
from lightning_tex.planner.batches import GrownBatch, TokenBlocks, batches_of
from lightning_tex.planner.cluster import CLUSTERS
from lightning_tex.planner.describe import describe
from lightning_tex.planner.fake_values import Routing
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.memory import memory
from lightning_tex.planner.optimizers import assumed_adamw
from lightning_tex.planner.search import plan_all
from lightning_tex.planner.traced import TracedActivations, UntraceableError
from lightning_tex.strategy.precision import TexMixedPrecision
from lightning_tex.testing.ranks import run_ranks

S, B = 128, 4
SHAPE = {"dim": 256, "num_layers": 4, "num_heads": 8, "hidden_dim": 512, "max_sequence_length": S, "num_experts": 4}
CONFIGS = (
    DecoderConfig(vocab_size=512, capacity_factor=1.0, activation="gelu", top_k=2, **SHAPE),
    DecoderConfig(vocab_size=512, activation="swiglu", top_k=4, moe_every=1, **SHAPE),
    DecoderConfig(vocab_size=6000, capacity_factor=1.25, activation="swiglu", top_k=1, **SHAPE),
    DecoderConfig(
        vocab_size=512, top_k=2, moe_every=1, qk_norm="head", head_dim=48, attention_bias=True, expert_hidden_dim=96,
        first_dense_layers=1, mlp_bias=True, **SHAPE,
    ),
)  # fmt: skip
LAYOUTS = Layout(1), Layout(2, 2, 1, 2), Layout(4, 1, 4, 1), Layout(4, 2, 2, 2), Layout(8, 2, 4, 1)
MODES = None, "full", "communication_aware"
ADAMW_ONE_GROUP = assumed_adamw("not asked")


def as_formulas_say(config: DecoderConfig, layout: Layout, sequence: bool, mode: Any, precision: str) -> None:
    module = LanguageModel(config)
    with torch.device("meta"):
        module.decoder = Decoder(config)
    traced = TracedActivations(module, None, TokenBlocks(config.vocab_size))
    job = Job(describe(module), layout.world, S, B * layout.data, precision)
    assert job.model.declared
    for stage in (1, 2):
        candidate = Candidate(layout, B, 1, stage, mode, communication=Communication(sequence_parallel=sequence))
        planned = memory(job, candidate, "cpu")
        seen = memory(replace(job, activations=traced), candidate, "cpu")
        assert planned.states == seen.states
        assert seen.peak == pytest.approx(planned.peak, rel=0.05), (config, layout, sequence, mode, precision, stage)


@pytest.mark.parametrize(
    ("config", "layout", "sequence", "mode", "precision"),
    [
        (CONFIGS[0], LAYOUTS[3], False, "communication_aware", "bf16-mixed"),
        pytest.param(CONFIGS[1], LAYOUTS[4], True, "full", "32-true", marks=pytest.mark.full),
        pytest.param(CONFIGS[2], LAYOUTS[2], False, None, "bf16-mixed", marks=pytest.mark.full),
        pytest.param(CONFIGS[3], LAYOUTS[3], True, None, "bf16-mixed", marks=pytest.mark.full),
    ],
    ids=["TED, replayed", "folded, sequence parallel, dropless, recomputed", "experts apart", "norms of heads"],
)
def test_a_decoders_activations_are_those_of_the_formulas(
    config: DecoderConfig, layout: Layout, sequence: bool, mode: Any, precision: str
) -> None:
    as_formulas_say(config, layout, sequence, mode, precision)


@pytest.mark.full
def test_a_decoders_activations_are_those_of_the_formulas_on_every_layout() -> None:
    for values in itertools.product(CONFIGS, LAYOUTS, (False, True), MODES, ("32-true", "bf16-mixed")):
        if not values[2] or values[1].tensor > 1:
            with case(*values):
                as_formulas_say(*values)


class OwnBlock(nn.Module):
    """A block of the user's: dense and mixed layers side by side, not one after another."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.norm, self.dense = RMSNorm(dim), ParallelMLP(dim, 2 * dim)
        self.mixed = MoE(dim, 2 * dim, experts, top_k=2, capacity_factor=1.0)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.dense(normed) + self.mixed(normed).tanh()


class OwnStack(L.LightningModule):
    """Blocks that can be recomputed, between plain and sharded layers."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(FEATURES, width), RowParallelLinear(width, width)
        self.blocks = nn.ModuleList(OwnBlock(width, 4) for _ in range(2))
        self.head = nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        x = self.down(self.up(batch[0]).relu())
        for block in self.blocks:
            x = block(x)
        return {"loss": (self.head(x).squeeze(-1) - batch[1]).square().mean()}


class TrainedKinds(TwoKinds):
    """TwoKinds with a step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()


SAMPLES = 1024


def route_evenly(module: nn.Module) -> None:
    """As many choices on each expert: elsewhere the rows of dropless experts would be the routing's doing."""

    def even(route: Any) -> Any:
        indices = Routing().choose(*route.indices.shape, route.scores.shape[-1])
        return route._replace(indices=indices)

    for router in module.modules():
        if isinstance(router, Router):
            router.register_forward_hook(lambda _, __, route: even(route))


def _peak_of(step: Callable[[], None]) -> float:
    with Allocations() as allocations:
        step()
    return float(allocations.peak_bytes)


def measured_and_traced(
    build: Any, layout: tuple[int, ...], mode: Any, precision: str, stage: int
) -> tuple[float, float]:
    """What a step holds above the states, seen and foreseen."""
    topology = join(*layout, overlap=False)
    torch.manual_seed(0)
    module = build()
    route_evenly(module)
    batch = [torch.randn(SAMPLES, FEATURES), torch.randn(SAMPLES)]
    traced = TracedActivations(build(), None, GrownBatch([t[:4] for t in batch], 4))
    world = topology.layout.world
    job = Job(describe(module), world, 1, SAMPLES * topology.layout.data, precision, 1.0, ADAMW_ONE_GROUP, traced)
    shard_module(module, topology)
    recompute_blocks(module, mode)
    if precision == "bf16-mixed":
        TexMixedPrecision("bf16-mixed", "cpu").convert_module(module)
    parameters = dict(module.named_parameters())
    shardings = {parameters[name]: s for name, s in parameter_shardings(module, topology).items()}
    optimizer = TiledOptimizer(
        torch.optim.AdamW(module.parameters()), shardings, topology.world, OptimizerStateConfig(zero_stage=stage),
        topology.communication,
    )  # fmt: skip

    def step() -> None:
        of_a_loader = [tensor.clone() for tensor in batch]
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            result = module.training_step(*[of_a_loader, 0][: module.training_step.__code__.co_argcount - 1])
            loss = (result["loss"] if isinstance(result, dict) else result) + auxiliary_loss(module)
        optimizer.zero_grad()
        announced_backward(optimizer, loss, undisturbed=True)
        optimizer.step()

    step()
    if world == 1:
        seen = float(peak_bytes(step, torch.device("cpu")))
    else:
        seen = min(_peak_of(step) for _ in range(3))  # gloo's threads let go of buffers when they come to it
    candidate = Candidate(topology.layout, SAMPLES, 1, stage, mode, communication=topology.communication)
    return seen, memory(job, candidate, "cpu").fullest.bytes


def compare(cases: list[tuple[Any, ...]]) -> None:
    warnings.simplefilter("ignore")
    for values in cases:
        with case(*values):
            seen, foreseen = measured_and_traced(*values)
            assert foreseen == pytest.approx(seen, rel=0.05)
    if dist.is_initialized():
        dist.barrier()


CASES = {
    1: [
        (regression, (1, 1, 1), None, "32-true", 1), (TrainedKinds, (1, 1, 1), None, "bf16-mixed", 1),
        (OwnStack, (1, 1, 1), "full", "32-true", 1), (OwnStack, (1, 1, 1), None, "bf16-mixed", 2),
    ],
    # ZeRO 0 has no buffers that gloo's threads would let go of when they come to it.
    4: [(OwnStack, (2, 2, 2), "communication_aware", "32-true", 0), (regression, (2, 1, 2), None, "32-true", 0)],
}  # fmt: skip
MORE = [
    (TrainedKinds, (2, 2, 2), None, "32-true", 1), (TrainedKinds, (2, 4, 1), None, "bf16-mixed", 1),
    (OwnStack, (1, 4, 1), "full", "bf16-mixed", 1), (OwnStack, (4, 1, 4), None, "32-true", 2),
]  # fmt: skip


@pytest.mark.parametrize("world", CASES)
def test_own_modules_hold_what_was_traced(world: int) -> None:
    run_ranks(world, compare, CASES[world])


@pytest.mark.full
def test_own_modules_hold_what_was_traced_on_further_layouts() -> None:
    run_ranks(4, compare, MORE)


def own_job(module: L.LightningModule, batch: int = 64, world: int = 1, batches: Any = None) -> Job:
    batches = batches or GrownBatch([torch.randn(4, FEATURES), torch.randn(4)], 4)
    source = TracedActivations(module, None, batches)
    return Job(describe(module), world, 1, batch, "32-true", optimizer=ADAMW_ONE_GROUP, activations=source)


def test_other_micro_batches_are_interpolated_between_two_that_were_traced() -> None:
    job, exact = own_job(regression(), 512), own_job(regression(), 512)
    for micro in (512, 256):
        memory(job, Candidate(Layout(1), micro))
    needed, traced = (memory(of, Candidate(Layout(1), 32)) for of in (job, exact))
    assert needed.fullest.bytes == pytest.approx(traced.fullest.bytes, rel=0.02)
    ways = job.activations._traces.values()
    assert [sorted(traces) for traces in ways] == [[256, 512]], "ways of running it, and what was traced of each"


def test_what_a_traced_micro_batch_keeps_is_known_of_others() -> None:
    job = own_job(regression(), 512)
    memory(job, Candidate(Layout(1), 128))
    for micro, least in ((512, 0.2), (128, 1.0), (32, 0.9)):
        exact = own_job(regression(), 512)
        memory(exact, Candidate(Layout(1), micro))
        (traces,) = exact.activations._traces.values()
        kept = traces[micro].live[:, traces[micro].forward].sum()
        known = job.activations.at_least(job, Candidate(Layout(1), micro), "cuda")
        assert least * kept <= known <= kept
    large = Candidate(Layout(1), 512)
    room = memory(job, Candidate(Layout(1), 128)).states.total + job.activations.at_least(job, large, "cuda") - 1
    assert memory(job, large, enough=room).at_least
    assert [sorted(traces) for traces in job.activations._traces.values()] == [[128]], "without another trace"


def test_nothing_is_left_behind() -> None:
    module = regression()
    before = {name: (p.clone(), p.grad) for name, p in module.named_parameters()}
    job = own_job(module)
    state = torch.random.get_rng_state()
    memory(job, Candidate(Layout(1), 64))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32 and module._trainer is None
    for name, parameter in module.named_parameters():
        assert type(parameter.data) is Tensor and torch.equal(parameter, before[name][0]) and parameter.grad is None


class Selecting(OwnStack):
    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return self.head(self.down(self.up(x[y > 0]))).mean()


class OfItsOwnGroup(OwnStack):
    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = super().training_step(batch)["loss"]
        dist.all_reduce(loss)
        return loss


class Manual(OwnStack):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refusals() -> None:
    dist.init_process_group("gloo")
    for kind, said in (
        (Selecting, "DynamicOutputShape"),
        (OfItsOwnGroup, "process group of its own"),
        (Manual, "optimized manually"),
    ):
        with pytest.raises(UntraceableError, match=said):
            memory(own_job(kind()), Candidate(Layout(1), 64))


def test_what_cannot_be_traced_says_why() -> None:
    run_ranks(1, refusals)


class Once(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from torch.randn(8, FEATURES)


def test_batches_of_a_loader() -> None:
    data = TensorDataset(torch.randn(6, 3), torch.arange(6))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    floats, numbers = batches_of(DataLoader(data, batch_size=2, shuffle=True), may_iterate=False).of(10, 1)
    assert floats.shape == (10, 3) and numbers.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert torch.equal(torch.random.get_rng_state(), state), "no number is taken from a training's"
    assert batches_of(DataLoader(Once(), batch_size=2), may_iterate=True).of(7, 1).shape == (7, FEATURES)
    with pytest.raises(ValueError, match="only be iterated over"):
        batches_of(DataLoader(Once(), batch_size=2), may_iterate=False)
    with pytest.raises(ValueError, match="training data are empty"):
        batches_of([], may_iterate=True)


def test_a_search_traces_the_fastest_until_enough_fit() -> None:
    job = own_job(regression(), 64, 4)
    plans = plan_all(job, CLUSTERS["h100"], wanted=2)
    assert len(plans.fitting) == 2 and plans.left_out > 0
    assert len(job.activations._traces) <= 2
    states = min(memory(job, planned.candidate).states.total for planned in plans.found)
    tiny = CLUSTERS["h100"].__class__(**{**vars(CLUSTERS["h100"]), "memory_bytes": states / 100, "reserved_bytes": 0})
    nothing = own_job(regression(), 64, 4)
    refused = plan_all(nothing, tiny, wanted=2)
    assert not refused.fitting and all(planned.memory.at_least for planned in refused.found)
    assert not nothing.activations._traces, "states alone rule it out"
