"""Steps that are scaled and left out by scalars which nobody reads, and windows of several shards in one call."""

import pytest
import torch
from helpers.optimizer_alone import COMPACT, KINDS, network, set_gradients, tiled
from torch import nn

from lightning_tex.optim.walk import Walk


def kept(optimizer):
    """Everything that a step changes."""
    found = {}
    for place, shard in enumerate(optimizer.shards):
        found[place, "parameters"] = shard.buffer.parameters
        for number, (_, tensor) in enumerate(shard.states.memory()):
            found[place, number] = tensor
    return {key: tensor.clone() for key, tensor in found.items()}


def walk(optimizer, *decided):
    with torch.no_grad():
        optimizer._walk(Walk(*decided))


FUSED = {name: KINDS[name] for name in ("AdamW", "Adam", "SGD", "SGD momentum", "SGD nesterov", "Adagrad")}
FORMATS = [
    *((name, torch.float32, "fp32") for name in FUSED),
    *((name, torch.bfloat16, form) for name in ("AdamW", "SGD momentum") for form in ("fp32", *COMPACT)),
]


@pytest.mark.parametrize(("kind", "dtype", "form"), FORMATS)
def test_a_step_left_out_on_the_device_changes_no_bit(kind, dtype, form):
    model = network(dtype)
    optimizer = tiled(model, FUSED[kind](model.parameters()), 128, optimizer_state_format=form)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    before = kept(optimizer)
    set_gradients(model, 3)
    model[0].weight.grad[0, 0] = float("nan")
    walk(optimizer, torch.tensor(0.5), torch.ones(()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in kept(optimizer).items())


@pytest.mark.parametrize(("kind", "dtype", "form"), FORMATS)
def test_a_step_taken_by_the_device_is_that_of_numbers(kind, dtype, form):
    results = []
    for decided in ((0.25, None), (torch.tensor(0.25), torch.zeros(()))):
        model = network(dtype)
        optimizer = tiled(model, FUSED[kind](model.parameters()), 128, optimizer_state_format=form)
        set_gradients(model, 0)
        optimizer.step()
        for step in range(1, 4):
            set_gradients(model, step)
            walk(optimizer, *decided)
        results.append(kept(optimizer))
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())


def test_shards_whose_gradients_are_divided_differently_are_scaled_each_by_its_own():
    for scale in (1.0, torch.tensor(2.0, dtype=torch.float64)):
        model = nn.ParameterList([torch.zeros(64), torch.zeros(64, dtype=torch.float64), torch.zeros(64)])
        optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=1.0))
        optimizer.zero_grad(set_to_none=False)
        for p in model:
            p.grad.fill_(1.0)
        for shard, divisor in zip(optimizer.shards, (2, 4), strict=True):
            shard.gradients.divisor = divisor
        walk(optimizer, scale)
        assert [p[0].item() for p in model] == [-scale / 2, -scale / 4, -scale / 2]
