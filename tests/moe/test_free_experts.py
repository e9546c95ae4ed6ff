"""Experts that give nothing, or the token: as a plain loop has them, on layouts, and in what is counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import SmallDecoder, batches
from helpers.cases import case
from helpers.plain_moe import expert
from helpers.topologies import join
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import MoE
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import parameter_shardings, shard_module
from lightning_tex.testing import assert_trains_alike
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, ZERO, IDENTITY = 6, 4, 1, 2
# tensor, expert, expert_tensor; sequence parallel
LAYOUTS = [((2, 2, 2), False), ((1, 4, 1), False), ((2, 4, 1), True), ((4, 1, 4), False)]


def build(**options: Any) -> MoE:
    torch.manual_seed(0)
    given = {"top_k": 3, "zero_experts": ZERO, "identity_experts": IDENTITY, "load_balance_coefficient": 0.0, **options}
    return MoE(DIM, 8, EXPERTS, **given).double()


def plain(layer: MoE, x: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """One choice after the other; and how often each expert was chosen."""
    scores = (x @ layer.router.weight.T).softmax(-1)
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, : layer.top_k]
    counts, rows = [0] * (EXPERTS + ZERO + IDENTITY), list(torch.zeros_like(x).unbind())
    for t in range(len(x)):
        for e in best[t].tolist() if mask[t] else []:
            counts[e] += 1
            if e < EXPERTS:
                bias = 0 if layer.output_biases is None else layer.output_biases.weight[e]
                rows[t] = rows[t] + scores[t, e] * (expert(layer.experts, e, x[t]) + bias)
            elif e >= EXPERTS + ZERO:
                rows[t] = rows[t] + scores[t, e] * x[t]
    return torch.stack(rows), counts


def batch(rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 8, DIM, generator=generator, dtype=torch.float64), torch.arange(16).view(2, 8) % 5 > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # whose code it is, on a CPU
def test_it_is_the_plain_loop_forward_and_backward(bias: bool, device: str) -> None:
    layer = build(bias=bias)
    if layer.experts.up_bias is not None:
        layer.experts.up_bias.data.zero_()
        layer.experts.up_bias.requires_grad_(False)
    reference = copy.deepcopy(layer)
    x, mask = batch()
    given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pretend_device(device):
        y = layer(given, mask)
    wanted, counts = plain(reference, expected.flatten(0, 1), mask.flatten())
    torch.testing.assert_close(y.flatten(0, 1), wanted)
    upstream = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    with pretend_device(device):
        y.backward(upstream)
    wanted.backward(upstream.flatten(0, 1))
    torch.testing.assert_close(given.grad, expected.grad)
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert layer.load.take().tolist() == [*counts, 0] and all(counts)


def test_a_token_with_none_that_computes_does_not_travel() -> None:
    layer = build(top_k=1)
    layer.router.weight.data.zero_()[EXPERTS + ZERO] = 5.0
    x = batch()[0].abs()
    score = layer.router(x.flatten(0, 1)).weights.view(2, 8, 1)
    torch.testing.assert_close(layer(x), score * x)
    assert layer.last_arrived_rows == 0


def compare(layouts: list[Any]) -> None:
    for (sizes, sequence), options in [(at, o) for at in layouts for o in ({}, {"capacity_factor": 4.0})]:
        with case(sizes, sequence, options):
            topology = join(*sizes, sequence_parallel=sequence)
            tensor, data = topology.tensor, topology.data
            layer = build(**options)
            reference = copy.deepcopy(layer)
            shard_module(layer, topology)
            every = [batch(rank) for rank in range(data.size)]
            x, mask = (t.chunk(tensor.size, 1)[tensor.rank] if sequence else t for t in every[data.rank])
            x = x.clone().requires_grad_()
            layer(x, mask).square().sum().backward()
            for rank, (whole, real) in enumerate(every):
                given = whole.clone().requires_grad_()
                reference(given, real).square().sum().backward()
                if rank == data.rank:
                    own = given.grad.chunk(tensor.size, 1)[tensor.rank] if sequence else given.grad
                    torch.testing.assert_close(x.grad, own, rtol=1e-10, atol=1e-11)
            shardings = parameter_shardings(layer, topology)
            for name, p in layer.named_parameters():
                mine = all_reduce(p.grad, tensor) if sequence and name == "router.weight" else p.grad
                found = shardings[name].gather(all_reduce(mine, shardings[name].replicas))
                wanted = reference.get_parameter(name).grad
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_on_ranks_it_is_one_process() -> None:
    run_ranks(4, compare, LAYOUTS[:1])


@pytest.mark.full
def test_on_every_layout_it_is_one_process() -> None:
    run_ranks(4, compare, LAYOUTS)


SIZES = {"vocab_size": 61, "dim": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "num_experts": 4, "top_k": 2}


@pytest.mark.full
@pytest.mark.parametrize("router", ["softmax", {"name": "sigmoid", "init_args": {"bias_update_rate": 0.01}}])
def test_a_training_is_the_same_on_layouts(router: Any) -> None:
    config = DecoderConfig(
        **SIZES, zero_experts=1, identity_experts=1, router=router, sequence_balance_coefficient=0.1,
        step_balance_coefficient=0.1,
    )  # fmt: skip
    ids = torch.randint(61, (32, 9), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    layout = {"devices": 4, "tensor_parallel_size": 2, "activation_checkpointing": "communication_aware"}
    assert_trains_alike(
        lambda: LanguageModel(config),
        DataLoader(samples, batch_size=8),
        layouts=[layout],
        steps=2,  # type: ignore[arg-type]
    )


def test_losses_see_them() -> None:
    module = SmallDecoder(zero_experts=1, load_balance_coefficient=1.0)
    layer = next(layer for _, layer in module.decoder.moe_layers())
    seen: list[Any] = []
    layer.router.register_forward_hook(lambda _, __, route: seen.append(route))
    module.decoder(batches(1)[0][0])
    [loss] = layer.ledger.collect()
    [route] = seen
    shares = torch.bincount(route.indices.flatten(), minlength=5) / route.indices.numel()
    expected = 5 * (shares * route.scores.detach().mean(0)).sum()
    torch.testing.assert_close(loss.detach(), expected)


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserValueError, match="zero_experts=-1, identity_experts=2; legal: 0, or above"):
        build(zero_experts=-1)
    with pytest.raises(UserValueError, match="top_k=8 must be between 1 and num_experts=7"):
        build(top_k=8)
