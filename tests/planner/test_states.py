"""Planned bytes of parameters, gradients and states against what the real optimizer allocates: equal, not close."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.cases import case, cover_pairs
from helpers.normed_attention import Declared, NormedDecoder
from helpers.own_modules import TwoKinds, regression
from helpers.topologies import join
from torch import nn

from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer, flat_sizes
from lightning_tex.optim.shard import batches, by_kind
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.parallel.topology import Axis, Topology
from lightning_tex.planner.describe import describe, describe_decoder
from lightning_tex.planner.layouts import Candidate, Job, layouts
from lightning_tex.planner.memory import memory
from lightning_tex.planner.optimizer_traffic import combination
from lightning_tex.planner.optimizer_trial import read_optimizer
from lightning_tex.planner.optimizers import ADAMW, assumed_adamw
from lightning_tex.planner.states import FlatBuffers, StateBytes, kept_format, state_bytes, tile_bytes, tile_elements
from lightning_tex.strategy.precision import TexHalfPrecision, TexMixedPrecision, TexPrecision
from lightning_tex.testing.ranks import run_ranks

CONFIGS = {
    "swiglu, grouped heads, padded vocabulary": DecoderConfig(
        vocab_size=101, dim=64, num_layers=3, num_heads=8, num_kv_heads=4, hidden_dim=72, num_experts=4, top_k=2,
        moe_every=1,
    ),
    "gelu, untied": DecoderConfig(
        vocab_size=96, dim=48, num_layers=4, num_heads=4, num_experts=8, activation="gelu", tie_embeddings=False,
    ),
    "experts in listed blocks": DecoderConfig(
        vocab_size=96, dim=48, num_layers=5, num_heads=4, hidden_dim=32, num_experts=4, moe_layers=[1, 3, 4],
    ),
    "no experts": DecoderConfig(vocab_size=96, dim=48, num_layers=2, num_heads=4),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_layers_own(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = Decoder(config)
    described = describe_decoder(config)
    assert {p.name: p.shape for p in described.parameters} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert [p.name for p in described.parameters] == [n for n, _ in model.named_parameters()]
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert described.counts()["expert"] == experts
    assert sum(described.counts().values()) == sum(p.numel() for p in model.parameters())
    built = describe(model)  # all blocks, where the other has one of each kind repeated
    assert built.parameters == described.parameters and built.layers == described.layers[:-1]
    assert (built.tied, built.declared) == (described.tied, described.declared) == (config.tie_embeddings, True)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_rank_stores_is_what_placement_cuts(name: str) -> None:
    described, seen = describe_decoder(CONFIGS[name]), 0
    for world in range(1, 9):
        for layout in layouts(described, world):
            with torch.device("meta"):
                model = Decoder(CONFIGS[name])
            check_shardable(model, layout)
            shard_module(model, Topology.without_groups(layout))
            stored = [prod(sharding.box.stored) for sharding in described.shardings(layout)]
            assert stored == [p.numel() for p in model.parameters()], layout
            seen += 1
    assert seen > 12


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_are_those_that_the_layers_accept(name: str) -> None:
    described = describe_decoder(CONFIGS[name])
    with torch.device("meta"):
        model = Decoder(CONFIGS[name])
    for world in range(1, 9):
        legal = set()
        for tensor in range(1, world + 1):
            for expert_tensor in {1, tensor}:
                for expert in range(1, world + 1):
                    try:
                        layout = Layout.resolve(world, tensor, expert, expert_tensor, described.experts)
                        layout.require_experts(described.experts)
                        check_shardable(model, layout)
                    except ValueError:
                        continue
                    legal.add(layout)
        assert set(layouts(described, world)) == legal


class Groups(nn.Module):
    """Parameter names and groups as LanguageModel has them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)

    def groups(self) -> list[dict[str, object]]:
        parameters = list(self.parameters())
        return [{"params": [p for p in parameters if (p.dim() > 1) == matrix]} for matrix in (True, False)]


PLUGINS = {
    "32-true": TexPrecision(),
    "bf16-mixed": TexMixedPrecision("bf16-mixed", "cpu"),
    "bf16-true": TexHalfPrecision("bf16-true"),
    "16-true": TexHalfPrecision("16-true"),
}


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def one_group(model: nn.Module) -> list[dict[str, object]]:
    return [{"params": list(model.parameters())}]


def most_at_once(optimizer: TiledOptimizer) -> dict[int, int]:
    """Elements of the largest call, by bytes of a parameter's element."""
    most: dict[int, int] = defaultdict(int)
    for batch in (batch for alike in by_kind(optimizer.shards) for batch in batches(alike)):
        size = batch.windows[0].states.own.itemsize
        most[size] = max(most[size], sum(len(window.gradient) for window in batch.windows))
    return most


def allocated(
    build: Callable[[], nn.Module],
    groups: Callable[[Any], list[dict[str, object]]],
    layout: Layout,
    precision: str,
    stage: int,
    optimizer_state_format: str,
    tile: int | None,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
):
    """Bytes that a real optimizer holds after a step, and those of frozen parameters; and :func:`most_at_once`."""
    topology = join(layout.tensor, layout.expert, layout.expert_tensor)
    torch.manual_seed(0)
    model = build()
    shard_module(model, topology)
    plugin = PLUGINS[precision]
    plugin.convert_module(model)
    parameters = dict(model.named_parameters())
    by_name = parameter_shardings(model, topology)
    shardings = {parameters[name]: sharding for name, sharding in by_name.items()}
    state_config = plugin.state_config(
        OptimizerStateConfig(zero_stage=stage, optimizer_state_format=optimizer_state_format, tile_size=tile)
    )
    optimizer = TiledOptimizer(optimizer_class(groups(model)), shardings, topology.world, state_config)
    optimizer.zero_grad()
    optimizer.step()
    found = StateBytes(0, 0, 0, 0, 0, 0).__dict__.copy()
    found["dense_parameters"] += distinct_bytes([p for p in model.parameters() if not p.requires_grad])
    for shard in optimizer.shards:
        expert = shard.buffer.replicas.name == "expert_data"
        kind = "expert_parameters" if expert else "dense_parameters"
        found[kind] += distinct_bytes([shard.buffer.parameters])
        gradients = shard.gradients
        found["gradients"] += distinct_bytes([gradients.flat if stage < 2 else gradients.sum])
        states = shard.states
        if hasattr(states, "windows"):
            if states.has_master:
                found["master"] += distinct_bytes([states.values])
            each = [value for window in states.windows for value in window.state.values() if value is not None]
        else:
            if hasattr(states.master, "remainder"):
                found["master"] += distinct_bytes([states.master.remainder])
            moments = states.moments
            if hasattr(moments, "values"):
                found["moments"] += distinct_bytes(list(moments.values.values()))
            else:
                found["moments"] += distinct_bytes([*moments.codes.values(), *moments.scales.values()])
            each = [value for numbers in states.numbers for value in numbers.values() if value is not None]
        found["moments"] += distinct_bytes([value for value in each if value.dim()])
        found["scalars"] += distinct_bytes([value for value in each if not value.dim()])
    return found, most_at_once(optimizer)


KINDS = [
    ("32-true", 0, "fp32", None), ("32-true", 2, "fp32", 512), ("bf16-mixed", 0, "fp32", 1000),
    ("bf16-mixed", 1, "fp32", None), ("bf16-mixed", 1, "split", 600), ("bf16-mixed", 2, "int8", None),
    ("bf16-mixed", 2, "stochastic", None), ("16-true", 1, "fp32", None), ("bf16-true", 0, "int8", 512),
]  # fmt: skip


def state_cases(world: int) -> list[tuple[str, Any, Any]]:
    """(Name of a model, layout that it allows, kind of state), every one."""
    models = {name: describe_decoder(config) for name, config in CONFIGS.items()}
    return [(name, layout, kind) for name in models for layout in layouts(models[name], world) for kind in KINDS]


def compare_states(world: int, cases: list[tuple[str, Any, Any]]) -> None:
    warnings.simplefilter("ignore")
    flat_sizes.SMALLEST_BUCKET = 4096  # several buffers of a kind
    for name, layout, (precision, stage, optimizer_state_format, tile) in cases:
        with case(name, layout, precision, stage, optimizer_state_format, tile):
            job = Job(describe_decoder(CONFIGS[name]), world, 16, world, precision)
            candidate = Candidate(layout, zero_stage=stage, optimizer_state_format=optimizer_state_format)
            planned = state_bytes(FlatBuffers.of(job, candidate), stage, optimizer_state_format, tile, "cpu")
            build = partial(Groups, CONFIGS[name])
            real, at_once = allocated(build, Groups.groups, layout, precision, stage, optimizer_state_format, tile)
            assert vars(planned) == real
            flat = FlatBuffers.of(job, candidate)
            formats = {size: kept_format(precision, optimizer_state_format, size) for size in at_once}
            needed = max(int(n * ADAMW.temporaries.of(formats[size])) for size, n in at_once.items())
            assert tile_bytes(flat, optimizer_state_format, tile, "cpu") == needed


@pytest.mark.parametrize("world", [1, 4])
def test_state_bytes_are_those_allocated(world: int) -> None:
    cases = cover_pairs(state_cases(world), lambda c: (c[0], c[1].tensor, c[1].expert, c[1].expert_tensor, *c[2]))
    run_ranks(world, compare_states, world, cases)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_state_bytes_of_every_layout_are_those_allocated(world: int) -> None:
    run_ranks(world, compare_states, world, state_cases(world), timeout=600)


def compare_own_modules(world: int) -> int:
    warnings.simplefilter("ignore")
    flat_sizes.SMALLEST_BUCKET = 1024  # several buffers of a kind
    seen = 0
    for build in (regression, TwoKinds):
        with torch.device("meta"):
            described = describe(build())
        for layout, kind in zip(layouts(described, world), itertools.cycle(KINDS)):
            precision, stage, optimizer_state_format, tile = kind
            job = Job(described, world, 1, world, precision, optimizer=assumed_adamw(""))
            candidate = Candidate(layout, zero_stage=stage, optimizer_state_format=optimizer_state_format)
            planned = state_bytes(FlatBuffers.of(job, candidate), stage, optimizer_state_format, tile, "cpu")
            real, _ = allocated(build, one_group, layout, precision, stage, optimizer_state_format, tile)
            assert vars(planned) == real, (build, layout, kind)
            needed = memory(job, candidate, "cpu", tile)
            assert needed.states.total <= needed.peak and not needed.fullest.activations
            seen += 1
    dist.barrier()  # the first rank holds the store in which the others find one another
    return seen


@pytest.mark.parametrize("world", [1, 4])
def test_state_bytes_of_own_modules_are_those_allocated(world: int) -> None:
    assert run_ranks(world, compare_own_modules, world, detail=False)[0] >= (2 if world == 1 else 12)


def split_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, of which the second keeps one state more; the last layer first."""
    last = list(model.head.parameters())
    rest = [p for p in model.parameters() if not any(p is other for other in last)]
    return [{"params": last}, {"params": rest, "amsgrad": True}]


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[Any], list[dict[str, Any]]]]] = {
    "SGD": (torch.optim.SGD, one_group),
    "SGD with momentum": (partial(torch.optim.SGD, momentum=0.9), one_group),
    "SGD in a loop": (partial(torch.optim.SGD, momentum=0.9, foreach=False), one_group),
    "Adam, two groups": (torch.optim.Adam, split_groups),
}


def compare_optimizers() -> None:
    warnings.simplefilter("ignore")
    flat_sizes.SMALLEST_BUCKET = 1024
    for (name, (build, groups)), kind in zip(OPTIMIZERS.items(), [KINDS[0], KINDS[4], KINDS[5], KINDS[8]], strict=True):
        precision, stage, optimizer_state_format, tile = kind
        with case(name, *kind):
            read = read_optimizer(TwoKinds(), lambda module, build=build, groups=groups: build(groups(module)))
            assert not read.assumed and len(read.costs) == len(groups(TwoKinds()))
            job = Job(describe(TwoKinds()), 1, 1, 1, precision, optimizer=read)
            candidate = Candidate(Layout(1), zero_stage=stage, optimizer_state_format=optimizer_state_format)
            planned = state_bytes(FlatBuffers.of(job, candidate), stage, optimizer_state_format, tile, "cpu")
            real, _ = allocated(
                TwoKinds, groups, Layout(1), precision, stage, optimizer_state_format, tile, build
            )  # fmt: skip
            assert vars(planned) == real


def test_state_bytes_of_other_optimizers_are_those_allocated() -> None:
    run_ranks(1, compare_optimizers)


def test_an_optimizer_is_read_or_assumed() -> None:
    read = read_optimizer(regression())
    assert (read.name, read.costs, read.assumed) == ("AdamW", (ADAMW,), "")
    partly = read_optimizer(TwoKinds(), lambda module: torch.optim.SGD(module.first.parameters()))
    described = describe(TwoKinds())
    assert {described.parameters[place].name.split(".")[0] for place in partly.grouping(described)[0]} == {"first"}
    flat = FlatBuffers.of(Job(described, 1, 1, 1, "32-true", optimizer=partly), Candidate(Layout(1)))
    trained = sum(p.numel for p in described.parameters if p.requires_grad)
    kept = sum(p.numel for p in described.parameters if p.name.startswith("first"))
    assert flat.loose_gradients == 4 * (trained - kept)
    for configure, said in (
        (lambda module: [torch.optim.SGD([p]) for p in module.parameters()][:2], "2 optimizers"),
        (lambda module: torch.optim.SGD(module.nothing), "AttributeError"),
        (lambda module: torch.optim.LBFGS(module.parameters()), "LBFGS"),
    ):
        assumed = read_optimizer(TwoKinds(), configure)
        assert assumed.name == "AdamW" and said in assumed.assumed


def test_an_own_module_is_described_as_it_is() -> None:
    described = describe(TwoKinds())
    assert not described.declared and described.experts == (4, 8)
    assert [parameter.name for parameter in described.parameters] == [n for n, _ in TwoKinds().named_parameters()]
    full = {parameter.name for parameter in described.parameters if parameter.full_precision}
    assert full == {f"{block}.{name}.weight" for block in ("first", "second") for name in ("norm", "layer.router")}
    assert {p.name for p in described.parameters if not p.requires_grad} == {"frozen.weight", "frozen.bias"}
    assert described.counts()["expert"] == 2 * 4 * 32 * 24 + 3 * 8 * 32 * 40
    kinds = [type(placed.layer).__name__ for placed in described.layers]
    assert kinds == ["Other", "Linear", "ColumnLinear", "RowLinear", *["Norm", "Moe"] * 2, "ColumnLinear", "Linear"]
    assert [placed.input_gradient for placed in described.layers[:4]] == [False, False, False, True]
    shard_module(sharded := TwoKinds(), Topology.without_groups(Layout(4, 2, 2, 2)))
    assert describe(sharded).parameters == described.parameters, "full sizes, sharded or not"


def test_formulas_are_claimed_for_decoders_alone() -> None:
    decoder = Decoder(DecoderConfig(96, 48, 2, 4))
    assert describe(decoder).declared
    beside, other = Decoder(DecoderConfig(96, 48, 2, 4)), Decoder(DecoderConfig(96, 48, 2, 4))
    beside.extra, other.blocks[0].mlp_norm = nn.Linear(2, 2), nn.Identity()
    assert not describe(beside).declared and not describe(other).declared
    assert not describe(nn.Sequential(Decoder(DecoderConfig(96, 48, 2, 4)), nn.Linear(96, 2))).declared
    frozen = Decoder(DecoderConfig(96, 48, 2, 4))
    frozen.norm.requires_grad_(False)
    assert not describe(frozen).declared


@pytest.mark.parametrize("optimizer_state_format", ["fp32", "split", "int8", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_as_large_as_the_strategys(optimizer_state_format: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64, bias=False, dtype=dtype)
    placed = {layer.weight: parameter_shardings(layer, Topology.single())["weight"]}
    optimizer = TiledOptimizer(
        torch.optim.AdamW(layer.parameters()),
        placed,
        Axis("world"),
        OptimizerStateConfig(optimizer_state_format=optimizer_state_format),
    )
    kept = kept_format("bf16-mixed", optimizer_state_format, layer.weight.element_size())
    assert optimizer.shards[0].states.tile_size == tile_elements(kept, None, "cpu")


def test_gradients_declared_partial_are_in_buffers_of_their_own_and_are_summed_over_tensor() -> None:
    described = describe(NormedDecoder(Declared))
    declared = {p.name for p in described.parameters if p.declared_partial}
    assert declared == {"attend.query_norm.weight", "attend.key_norm.weight"}
    layout = Layout(4, tensor=2)
    candidate = Candidate(layout, 2)
    buffers = FlatBuffers.of(Job(described, 4, 8, 4, "32-true"), candidate).buffers
    (apart,) = [buffer for buffer in buffers if buffer.declared_partial]
    assert apart.used == 8
    (sent,) = combination(apart, candidate)
    assert (sent.operation, sent.axis) == ("all_reduce", "tensor")
    assert not any(combination(buffer, candidate) for buffer in buffers if buffer is not apart)
