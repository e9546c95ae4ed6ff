"""Planned bytes of parameters, gradients and states against what the real optimizer allocates: equal, not close."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.cases import case, cover_pairs
from helpers.topologies import join
from torch import nn

from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer, flat_sizes
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.parallel.topology import Axis, Layout, Topology
from lightning_tex.planner.layouts import Candidate, Job, layouts
from lightning_tex.planner.sizes import ModelSizes
from lightning_tex.planner.states import StateBytes, kept_format, state_bytes, tile_elements
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
    "no experts": DecoderConfig(vocab_size=96, dim=48, num_layers=2, num_heads=4),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_layers_own(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = Decoder(config)
    sizes = ModelSizes.of(config)
    assert {p.name: p.shape for p in sizes.parameters()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert [p.name for p in sizes.parameters()] == [n for n, _ in model.named_parameters()]
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert sizes.counts()["expert"] == experts
    assert sum(sizes.counts().values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_rank_stores_is_what_placement_cuts(name: str) -> None:
    sizes, seen = ModelSizes.of(CONFIGS[name]), 0
    for world in range(1, 9):
        for layout in layouts(sizes, world):
            with torch.device("meta"):
                model = Decoder(CONFIGS[name])
            check_shardable(model, layout)
            axes = {axis: Axis(axis, getattr(layout, axis)) for axis in AXES}
            topology = Topology(layout, **axes, world=Axis("world", world))
            shard_module(model, topology)
            assert list(sizes.stored(layout)) == [p.numel() for p in model.parameters()], layout
            seen += 1
    assert seen > 12


AXES = ("tensor", "data", "expert_tensor", "expert", "expert_data")


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_are_those_that_the_layers_accept(name: str) -> None:
    sizes = ModelSizes.of(CONFIGS[name])
    for world in range(1, 9):
        legal = set()
        for tensor in range(1, world + 1):
            for expert_tensor in {1, tensor}:
                for expert in range(1, world + 1):
                    with torch.device("meta"):
                        model = Decoder(CONFIGS[name])
                    try:
                        layout = Layout.resolve(world, tensor, expert, expert_tensor, sizes.experts)
                        layout.require_experts(sizes.experts)
                        check_shardable(model, layout)
                    except ValueError:
                        continue
                    legal.add(layout)
        assert set(layouts(sizes, world)) == legal


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
}


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(
    config: DecoderConfig, layout: Layout, precision: str, stage: int, optimizer_state_format: str, tile: int | None
):
    """Bytes that a real optimizer holds after a step."""
    topology = join(layout.tensor, layout.expert, layout.expert_tensor)
    torch.manual_seed(0)
    model = Groups(config)
    shard_module(model, topology)
    plugin = PLUGINS[precision]
    plugin.convert_module(model)
    parameters = dict(model.named_parameters())
    placed = {parameters[name]: p for name, p in parameter_shardings(model, topology).items()}
    state_config = plugin.state_config(OptimizerStateConfig(stage, optimizer_state_format, tile_size=tile))
    optimizer = TiledOptimizer(torch.optim.AdamW(model.groups()), placed, topology.world, state_config)
    optimizer.zero_grad()
    optimizer.step()
    found = StateBytes(0, 0, 0, 0, 0, 0).__dict__.copy()
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
            each = [value for window in states.windows for value in window.state.values()]
        else:
            if hasattr(states.master, "remainder"):
                found["master"] += distinct_bytes([states.master.remainder])
            moments = states.moments
            if hasattr(moments, "values"):
                found["moments"] += distinct_bytes(list(moments.values.values()))
            else:
                found["moments"] += distinct_bytes([*moments.codes.values(), *moments.scales.values()])
            each = [value for numbers in states.numbers for value in numbers.values()]
        found["moments"] += distinct_bytes([value for value in each if value.dim()])
        found["scalars"] += distinct_bytes([value for value in each if not value.dim()])
    return found


KINDS = [
    ("32-true", 0, "fp32", None), ("32-true", 2, "fp32", 64), ("bf16-mixed", 0, "fp32", 1000),
    ("bf16-mixed", 1, "fp32", None), ("bf16-mixed", 1, "split", 100), ("bf16-mixed", 2, "int8", None),
    ("bf16-mixed", 2, "stochastic", None), ("bf16-true", 1, "fp32", None), ("bf16-true", 0, "int8", 64),
]  # fmt: skip


def state_cases(world: int) -> list[tuple[str, Any, Any]]:
    """(Name of a model, layout that it allows, kind of state), every one."""
    sizes = {name: ModelSizes.of(config) for name, config in CONFIGS.items()}
    return [(name, layout, kind) for name in sizes for layout in layouts(sizes[name], world) for kind in KINDS]


def compare_states(world: int, cases: list[tuple[str, Any, Any]]) -> None:
    warnings.simplefilter("ignore")
    flat_sizes.SMALLEST_BUCKET = 4096  # several buffers of a kind
    for name, layout, (precision, stage, optimizer_state_format, tile) in cases:
        with case(name, layout, precision, stage, optimizer_state_format, tile):
            job = Job(ModelSizes.of(CONFIGS[name]), world, 16, world, precision)
            candidate = Candidate(layout, zero_stage=stage, optimizer_state_format=optimizer_state_format)
            planned = state_bytes(job, candidate, tile, "cpu")
            assert vars(planned) == allocated(CONFIGS[name], layout, precision, stage, optimizer_state_format, tile)


@pytest.mark.parametrize("world", [1, 4])
def test_state_bytes_are_those_allocated(world: int) -> None:
    cases = cover_pairs(state_cases(world), lambda c: (c[0], c[1].tensor, c[1].expert, c[1].expert_tensor, *c[2]))
    run_ranks(world, compare_states, world, cases)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_state_bytes_of_every_layout_are_those_allocated(world: int) -> None:
    run_ranks(world, compare_states, world, state_cases(world), timeout=600)


@pytest.mark.parametrize("optimizer_state_format", ["fp32", "split", "int8", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_as_large_as_the_strategys(optimizer_state_format: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64, bias=False, dtype=dtype)
    placed = {layer.weight: parameter_shardings(layer, Topology.single())["weight"]}
    optimizer = TiledOptimizer(
        torch.optim.AdamW(layer.parameters()), placed, Axis("world"), OptimizerStateConfig(1, optimizer_state_format)
    )
    kept = kept_format("bf16-mixed", optimizer_state_format, layer.weight.element_size())
    assert optimizer.shards[0].states.tile_size == tile_elements(kept, None, "cpu")
