"""What a MoE layer costs a GPU, counted without one: launches, waiting of the host, and bytes kept for the backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.host_reads import HostRead, host_reads
from helpers.launches import Launches
from helpers.topologies import join
from torch import Tensor, nn

from lightning_tex.moe import MoE, auxiliary_loss
from lightning_tex.moe.products import GroupedProducts
from lightning_tex.parallel.activation_checkpointing import recompute_blocks, stash_bytes
from lightning_tex.parallel.allocations import storage_key
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks


def build(experts: int = 16, dim: int = 64, hidden: int = 32, **options: Any) -> MoE:
    """A layer in the precisions of bf16-mixed, as people train it."""
    torch.manual_seed(0)
    options = {"top_k": 8, "activation": "swiglu", "norm_topk_prob": True, **options}
    layer = MoE(dim, hidden, experts, **options)
    layer.experts.bfloat16()
    return layer


def tokens(count: int, dim: int = 64) -> Tensor:
    return torch.randn(count, dim).bfloat16().requires_grad_()


def launched(experts: int, leaves: bool, masked: bool = False, **options: Any) -> tuple[int, int]:
    """Launches of a forward and of a backward, of the code that a GPU runs."""
    layer, x = build(experts, **options), tokens(256)
    mask = torch.arange(256) % 5 > 0 if masked else None
    with pretend_device("cuda"):
        with Launches(leaves) as forward:
            y = layer(x, mask)
            loss = auxiliary_loss(layer)
        with Launches(leaves) as backward:
            torch.autograd.backward([y, loss], [torch.ones_like(y), None])
    assert forward.names["_grouped_mm"] == 3 and backward.names["_grouped_mm"] == 6
    return forward.count, backward.count


@pytest.mark.parametrize(
    "options", [{}, {"masked": True}, {"capacity_factor": 1.0}, {"z_loss_coefficient": 0.1}], ids=str
)
def test_launches_are_few_and_do_not_depend_on_the_number_of_experts(options: dict[str, Any]) -> None:
    forward, backward = launched(128, leaves=True, **options)
    assert forward <= 45 and backward <= 70
    assert launched(16, leaves=True, **options) == (forward, backward)


def test_launches_of_leaves_that_are_not_compiled() -> None:
    forward, backward = launched(128, leaves=False)
    assert forward <= 65 and backward <= 70


# --- waiting


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mlp = build(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


@dataclass
class Reads:
    forward: list[HostRead]
    backward: list[HostRead]


def reads_of(mode: Any, topology: Any = None, masked: bool = False, **options: Any) -> Reads:
    """Of a layer in a block, in training, of the code that a GPU runs."""
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(**options)])
    if topology is not None:
        shard_module(model, topology)
    recompute_blocks(model, mode)
    x = tokens(48)
    with pretend_device("cuda"):
        with host_reads() as forward:
            y = model.blocks[0](x)
            loss = auxiliary_loss(model)
        with host_reads() as backward:
            torch.autograd.backward([y.square().sum(), loss])
    return Reads(forward, backward)


MODES = (None, "full", "communication_aware")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("capacity_factor", [None, 1.0], ids=["dropless", "capacity"])
def test_the_host_waits_for_nothing_without_an_expert_axis(mode: Any, capacity_factor: float | None) -> None:
    assert reads_of(mode, capacity_factor=capacity_factor) == Reads([], [])


@pytest.mark.parametrize(
    ("router", "top_k", "waits"), [("switch", 1, 0), ("gshard", 2, 0), ("sinkhorn", 2, 0), ("expert_choice", 2, 1)]
)
def test_the_host_waits_for_no_router_but_where_experts_choose(router: str, top_k: int, waits: int) -> None:
    reads = reads_of("full", router=router, top_k=top_k)
    assert len(reads.forward) == waits and not reads.backward


def waiting_on_ranks() -> None:
    for layout, dropless in (((2, 1, 2), 0), ((2, 1, 2, False), 0), ((1, 2, 1), 1), ((2, 2, 1), 1)):
        for mode, capacity_factor, chunks in itertools.product(MODES, (None, 1.0), (1, 3)):
            reads = reads_of(mode, join(*layout, expert_chunks=chunks), capacity_factor=capacity_factor)
            expected = dropless if capacity_factor is None else 0
            assert len(reads.forward) == expected, (layout, mode, capacity_factor, chunks, reads.forward)
            assert not reads.backward, (layout, mode, capacity_factor, chunks, reads.backward)


def test_the_host_waits_once_for_dropless_rows_that_travel_and_never_again_for_a_recomputation() -> None:
    run_ranks(2, waiting_on_ranks, detail=False)


@pytest.mark.parametrize("capacity_factor", [None, 1.0], ids=["dropless", "capacity"])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_depends_on_values_that_a_device_does_not_tell(capacity_factor: float | None, masked: bool) -> None:
    with torch.device("meta"):
        layer, x = build(capacity_factor=capacity_factor), tokens(40)
        y = layer(x, torch.ones(40, dtype=torch.bool) if masked else None)
        torch.autograd.backward([y.sum(), auxiliary_loss(layer)])
    assert x.grad is not None and x.grad.shape == (40, 64)


# --- memory


@contextmanager
def kept_for_backward(module: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Storages that autograd saves inside, parameters not included."""
    parameters = {storage_key(p) for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in parameters:
            kept[storage_key(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_bytes_kept_of_a_layer() -> None:
    # A Qwen3-30B-A3B layer for 16k tokens, asked below 0.8 GB: an eighth of its widths, a hundred and twenty-eighth of
    # its tokens, so that all but the router's part is 1/1024 of that.
    layer, x = build(128, 256, 96), tokens(128, 256)
    with pretend_device("cuda"), kept_for_backward(layer) as kept:
        layer(x)
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 1024 * kept_bytes < 0.8e9
    rows, products = x.nbytes, 2 * 128 * 8 * 96 * 2
    assert kept_bytes < rows + products + 128 * (128 * 4 + 3 * 8 * 8) + 128 * 8 * 4


@pytest.mark.parametrize("capacity_factor", [None, 1.0], ids=["dropless", "capacity"])
def test_in_one_process_there_is_nothing_to_replay_and_nothing_stashed(capacity_factor: float | None) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(capacity_factor=capacity_factor)])
    recompute_blocks(model, "communication_aware")
    model.blocks[0](tokens(48))
    assert stash_bytes(model) == {"blocks.0": 0}


@pytest.mark.parametrize(
    ("dtype", "width", "grouped"), [(torch.bfloat16, 64, True), (torch.bfloat16, 60, False), (torch.float32, 64, False)]
)
def test_which_products_are_grouped(dtype: torch.dtype, width: int, grouped: bool) -> None:
    matrices = [torch.empty(4, 32, width), torch.empty(4, width, 32)]
    with pretend_device("cuda"):
        assert GroupedProducts.take(dtype, matrices) == grouped
    assert not GroupedProducts.take(dtype, matrices)
