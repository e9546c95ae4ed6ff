"""Planned activations against what autograd really saves in each block, and stashes against the tapes': equal."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.topologies import join
from torch import nn

from lightning_tex.layers import DocumentContext
from lightning_tex.models import DecoderConfig
from lightning_tex.models.decoder import Block
from lightning_tex.moe import auxiliary_loss
from lightning_tex.moe.losses import Coefficients, count_choices, routing_loss
from lightning_tex.moe.router import Route
from lightning_tex.parallel.activation_checkpointing import recompute_blocks, stash_bytes
from lightning_tex.parallel.activation_layout import Replicated
from lightning_tex.parallel.allocations import storage_bytes
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.parallel.topology import Axis
from lightning_tex.planner.activations import Activations
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.layers import Attention, Layer, Moe
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.micro_step import MicroStep
from lightning_tex.strategy.precision import TexMixedPrecision
from lightning_tex.testing.ranks import run_ranks

B, S = 3, 8
# Every token to every expert where the number of rows would depend on the routing.
CONFIGS = (
    DecoderConfig(96, 64, 2, 8, None, 80, S, 4, 2, 1.25, activation="gelu"),
    DecoderConfig(96, 64, 2, 8, 4, 80, S, 4, 4, None, norm_topk_prob=True, z_loss_coefficient=0.1),
    DecoderConfig(
        96, 64, 2, 8, 4, 80, S, 4, 4, 1.0, load_balance_coefficient=0, head_dim=6, qk_norm="head", expert_hidden_dim=48,
        attention_bias=True, attention_out_bias=True, first_dense_layers=1,
    ),
)  # fmt: skip


def layers_of(config: DecoderConfig, experts: bool) -> tuple[Layer, ...]:
    """The layers of a block with or without experts, as they are described."""
    return next(kind for kind in describe_decoder(config).blocks.kinds if isinstance(kind[-1], Moe) == experts)


def saved_bytes(block: Block, x: torch.Tensor, precision: str, context: DocumentContext | None = None) -> int:
    """Bytes of the distinct storages that autograd saves, without parameters and what all blocks have in common."""
    turn = block.attention.rotary
    rotary = turn.tables(S, x) if context is None else context.tables(turn, S, x)
    common = {t.untyped_storage().data_ptr() for t in (*block.parameters(), rotary.cos, rotary.sin)}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in common:
            saved[at] = tensor  # held, so that no address is used twice
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        y = block(x, context, rotary)
        return sum(t.untyped_storage().nbytes() for t in saved.values()) if y.requires_grad else 0


def compare(layouts: tuple[tuple[int, int, int, bool], ...], chunks: int = 1) -> int:
    seen = 0
    for layout, sequence, config, precision in itertools.product(layouts, (False, True), CONFIGS, PRECISIONS):
        if sequence and (layout[0] == 1 or config.capacity_factor == 1.25):
            continue
        topology = join(*layout, sequence_parallel=sequence, expert_chunks=chunks)
        job = Job(describe_decoder(config), topology.layout.world, S, B * topology.layout.data, precision)
        candidate = Candidate(topology.layout, B, communication=topology.communication)
        planned = Activations(MicroStep(job, candidate))
        dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
        for experts in (False, True):
            torch.manual_seed(0)
            block = Block(config, int(experts))
            shard_module(block, topology)
            if precision == "bf16-mixed":
                TexMixedPrecision("bf16-mixed", "cpu").convert_module(block)
            held = S // layout[0] if sequence else S
            x = torch.randn(B, held, config.dim, dtype=dtype).requires_grad_()
            real = saved_bytes(block, x, precision)
            # The way keeps its indices itself, and routing losses what they need, past these hooks.
            layers = layers_of(config, experts)
            moe = layers[-1]
            elsewhere = planned.indices(moe) + planned.routing_losses(moe) if isinstance(moe, Moe) else 0
            case = layout, sequence, config, precision, experts
            assert real == planned.block(layers) - elsewhere, case
            auxiliary_loss(block)
            seen += 1
    return seen


PRECISIONS = ("32-true", "bf16-mixed")


def test_documents_keep_tables_of_each_sequence_and_without_a_kernel_one_more_result() -> None:
    config, layers = CONFIGS[1], layers_of(CONFIGS[1], False)
    job = Job(describe_decoder(config), 1, S, B, "32-true", document_mask=True)
    planned = Activations(MicroStep(job, Candidate(Layout.resolve(1), B)))
    block, x = Block(config, 0), torch.randn(B, S, config.dim).requires_grad_()
    context = DocumentContext.of(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 2]]))
    tables = context.tables(block.attention.rotary, S, x)
    attention = next(layer for layer in layers if isinstance(layer, Attention))
    assert planned.rotary(attention) == tables.cos.nbytes + tables.sin.nbytes
    assert saved_bytes(block, x, "32-true", context) == planned.block(layers)
    by_one_kernel = Activations(MicroStep(replace(job, precision="bf16-mixed"), Candidate(Layout.resolve(1), B)))
    whole = Activations(MicroStep(replace(by_one_kernel.step.job, document_mask=False), by_one_kernel.step.candidate))
    assert by_one_kernel.saved(attention) == whole.saved(attention)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1]], ids=["balance", "balance and z"])
def test_what_routing_losses_keep(config: DecoderConfig) -> None:
    tokens, experts = B * S, config.num_experts
    logits = torch.randn(tokens, experts, requires_grad=True) * 1.0
    indices = logits.detach().topk(config.top_k).indices
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        route = Route(indices, logits, logits.detach(), logits)
        coefficients = Coefficients(config.load_balance_coefficient, config.z_loss_coefficient)
        counts = count_choices(indices, experts)
        routing_loss(route, counts, None, Axis("data"), Replicated(Axis("tensor")), coefficients)
    planned = Activations(MicroStep(Job(describe_decoder(config), 1, S, B, "32-true"), Candidate(Layout(1), B)))
    of_each_token = [t for t in saved.values() if t.dim() and t.shape[0] == tokens]
    assert storage_bytes(of_each_token) == planned.routing_losses(layers_of(config, True)[-1])


def compare_as_on_a_gpu() -> int:
    with pretend_device("cuda"):  # where all choices are rows, whichever overflow
        return compare(((1, 1, 1, True),))


def test_saved_bytes_of_a_block_in_one_process() -> None:
    assert run_ranks(1, compare_as_on_a_gpu, detail=False) == [12]


def test_saved_bytes_of_a_block_on_four_ranks() -> None:
    layouts = ((2, 2, 2, True), (2, 2, 2, False), (2, 4, 1, True), (4, 1, 4, True))
    assert min(run_ranks(4, compare, layouts, detail=False)) > 60
    assert min(run_ranks(4, compare, layouts[:1], 3, detail=False)) > 15


def compare_stashes(layouts: tuple[tuple[int, int, int, bool], ...]) -> int:
    seen = 0
    for layout, sequence, config, chunks in itertools.product(layouts, (False, True), CONFIGS, (1, 3)):
        if sequence and (layout[0] == 1 or config.capacity_factor == 1.25):
            continue
        topology = join(*layout, sequence_parallel=sequence, expert_chunks=chunks)
        job = Job(describe_decoder(config), topology.layout.world, S, B * topology.layout.data, "32-true")
        candidate = Candidate(
            topology.layout, B, activation_checkpointing="communication_aware", communication=topology.communication
        )
        model = nn.Module()
        model.blocks = nn.ModuleList(Block(config, layer) for layer in range(2))
        shard_module(model, topology)
        recompute_blocks(model, "communication_aware")
        x = torch.randn(B, S // layout[0] if sequence else S, config.dim).requires_grad_()
        with pretend_device("cpu" if topology.layout.world > 1 else "cuda"):
            y = model.blocks[1](model.blocks[0](x))
            tapes = [tape for block in model.blocks for tape in block.forward.tapes]
            decided = [storage_bytes(tensors_of(tape._decisions)) for tape in tapes]
            del tapes
            (y.sum() + auxiliary_loss(model)).backward()
        planned = [
            Activations(MicroStep(job, candidate)).stash(layers_of(config, experts)) for experts in (False, True)
        ]
        assert list(stash_bytes(model).values()) == planned, (layout, sequence, config, chunks)
        at, moe = Activations(MicroStep(job, candidate)), layers_of(config, True)[-1]
        assert decided == [0, at.decisions(moe)], (layout, sequence, config, chunks, decided)
        seen += 1
    return seen


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors that an object holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value if isinstance(value, (list, tuple)) else vars(value).values() if hasattr(value, "__dict__") else []
    return [tensor for each in inside for tensor in tensors_of(each)]


@pytest.mark.parametrize("world", [1, 4])
def test_stashes_are_those_on_the_tapes(world: int) -> None:
    layouts = (
        ((1, 1, 1, True),) if world == 1 else ((2, 2, 2, True), (2, 2, 2, False), (2, 4, 1, True), (1, 4, 1, True))
    )
    assert min(run_ranks(world, compare_stashes, layouts, detail=False)) >= 3
