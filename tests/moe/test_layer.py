"""The MoE layer in one process against the plain loop, forward and gradients."""

import copy
import math

import pytest
import torch
from helpers.plain_moe import plain_losses, plain_moe

from lightning_tex.moe import MoE, auxiliary_loss


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moe(**options):
    torch.manual_seed(0)
    return MoE(6, 10, 4, **options).double()


def capacity_of(layer, tokens):
    if layer.capacity_factor is None:
        return None
    return math.ceil(layer.capacity_factor * layer.top_k * tokens / layer.num_experts)


def compare(layer, x, mask=None):
    """Output, recorded loss and all gradients are the loop's. Returns the loop's outcome."""
    reference = copy.deepcopy(layer)
    flat_mask = None if mask is None else mask.flatten()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = randn(99, *x.shape)

    y = layer(a, mask)
    ((y * upstream).sum() + auxiliary_loss(layer)).backward()

    outcome = plain_moe(reference, b.view(-1, x.shape[-1]), flat_mask, capacity_of(layer, x[..., 0].numel()))
    balance, z = plain_losses([outcome], [flat_mask], layer.num_experts)
    auxiliary = layer.load_balance_coefficient * balance + layer.z_loss_coefficient * z
    ((outcome.output.view_as(x) * upstream).sum() + auxiliary).backward()

    torch.testing.assert_close(y, outcome.output.view_as(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    return outcome


MASK = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("capacity_factor", [None, 0.6, 1.0, 4.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1, "activation": "gelu"},
        {"top_k": 1, "activation": "swiglu"},
        {"top_k": 2, "activation": "gelu", "norm_topk_prob": True},
        {"top_k": 3, "activation": "swiglu"},
        {"top_k": 4, "activation": "swiglu", "norm_topk_prob": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_layer_is_the_loop(options, mask, capacity_factor):
    layer = moe(**options, capacity_factor=capacity_factor, load_balance_coefficient=0.3, z_loss_coefficient=0.2)
    compare(layer, randn(1, 3, 5, 6), mask)


def test_an_overflowed_choice_adds_nothing_and_is_counted():
    layer = moe(top_k=2, capacity_factor=0.5)
    outcome = compare(layer, randn(1, 16, 6))
    assert outcome.overflowed > 0
    load = layer.load.take()
    counts = [sum(e in chosen for chosen in outcome.choices) for e in range(4)]
    assert load.tolist() == [*counts, outcome.overflowed]
    assert layer.load.take() is None


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("experts_used", [(2,), (0, 3)], ids=["all on one", "two of four"])
def test_experts_without_tokens_have_zero_gradients(capacity_factor, experts_used):
    layer = moe(capacity_factor=capacity_factor, load_balance_coefficient=0.0)
    layer.router.weight.data = 20 * torch.eye(4, 6, dtype=torch.float64)
    x = 0.1 * randn(1, 8, 6)
    x[:, :4] = 0
    for t in range(8):
        x[t, experts_used[t % len(experts_used)]] = 1
    compare(layer, x)
    for e in set(range(4)) - set(experts_used):
        assert not layer.experts.up.grad[e].any() and not layer.experts.down.grad[e].any()
    for e in experts_used:
        assert layer.experts.up.grad[e].any()


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_no_tokens_at_all_and_only_masked_ones(capacity_factor):
    layer = moe(capacity_factor=capacity_factor, top_k=2, z_loss_coefficient=0.1)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    loss = layer(x).sum() + auxiliary_loss(layer)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 6)
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())

    x = randn(1, 5, 6).requires_grad_()
    loss = layer(x, torch.zeros(5).bool()).sum() + auxiliary_loss(layer)
    loss.backward()
    assert loss == 0 and not x.grad.any()
    assert all(not p.grad.any() for p in layer.parameters())


def test_masked_tokens_take_no_capacity():
    layer = moe(capacity_factor=1.0, load_balance_coefficient=0.0)
    layer.router.weight.data = 20 * torch.eye(4, 6, dtype=torch.float64)
    x = torch.zeros(8, 6, dtype=torch.float64)
    x[:, 0] = 1  # all want expert 0, which takes ceil(8 / 4) = 2
    mask = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0]).bool()
    y = layer(x, mask)
    assert (y != 0).any(-1).tolist() == [False, False, True, False, True, False, False, False]


def test_mask_may_be_numbers_and_shapes_may_be_any():
    layer = moe(top_k=2)
    x = randn(1, 3, 5, 6)
    assert torch.equal(layer(x, MASK), layer(x, MASK.long()))
    whole = layer(x)
    assert torch.equal(layer(x.view(15, 6)), whole.view(15, 6))
    assert torch.equal(layer(x.transpose(0, 1)), whole.transpose(0, 1))


def test_low_precision_tokens_come_back_in_their_dtype():
    torch.manual_seed(0)
    layer = MoE(6, 10, 4, top_k=2)
    x = torch.randn(12, 6)
    exact = layer(x)
    low = copy.deepcopy(layer)
    low.experts.bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
