"""What stands between the experts' products is what an MLP has there, times the weights of the rows, in both passes."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lightning_tex.layers.mlp import GATED, LIMIT, Activation, activated
from lightning_tex.moe import MoE
from lightning_tex.moe.activation import hidden, hidden_backward
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.products import GroupedProducts, LoopedProducts


@pytest.mark.parametrize("activation", get_args(Activation))
def test_hidden_units_and_their_gradients(activation: Activation) -> None:
    torch.manual_seed(0)
    up, gate, grad = (5 * torch.randn(3, 40, 6, dtype=torch.float64)).unbind()
    assert (up.abs() > LIMIT).any() and (gate > LIMIT).any()
    weights = torch.rand(40, dtype=torch.float64).requires_grad_()
    up, gate = up.requires_grad_(), gate.requires_grad_() if activation in GATED else None
    expected = activated(activation, up, gate) * weights[:, None]
    torch.testing.assert_close(hidden(up, gate, weights, activation), expected, rtol=1e-12, atol=1e-12)
    leaves = [up, weights, *([] if gate is None else [gate])]
    wanted = torch.autograd.grad(expected, leaves, grad)
    found = hidden_backward(grad, up.detach(), None if gate is None else gate.detach(), weights.detach(), activation)
    torch.testing.assert_close(found.hidden, expected.detach(), rtol=1e-12, atol=1e-12)
    mine = [found.up, found.weights, *([] if gate is None else [found.gate])]
    for one, reference in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-10, atol=1e-12)


def test_clamped_swiglu_is_gpt_oss_s() -> None:
    up, gate = torch.tensor([0.5, -9.0, 8.0, 1.0]), torch.tensor([1.0, 2.0, -30.0, 50.0])
    expected = []
    for u, g in zip(up.tolist(), gate.tolist(), strict=True):
        u, g = max(-7.0, min(u, 7.0)), min(g, 7.0)
        expected.append((u + 1) * g / (1 + 2.718281828459045 ** (-1.702 * g)))
    torch.testing.assert_close(activated("clamped_swiglu", up, gate), torch.tensor(expected))


@pytest.mark.parametrize("kind", [LoopedProducts, GroupedProducts])
def test_biases_by_group(kind: type[LoopedProducts]) -> None:
    sizes, dtype = [2, 0, 3], torch.bfloat16 if kind is GroupedProducts else torch.float64
    products = kind(Groups.of(sizes))
    rows, biases = torch.randn(5, 16).to(dtype), torch.randn(3, 16).to(dtype)
    expected = torch.stack([row + biases[e] for row, e in zip(rows, [0, 0, 2, 2, 2], strict=True)])
    assert torch.equal(products.add_biases(rows.clone(), biases), expected)
    sums = torch.stack([part.float().sum(0) for part in rows.split(sizes)])
    torch.testing.assert_close(products.biases_backward(rows).float(), sums, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("activation", ["gelu", "clamped_swiglu"])
def test_experts_with_biases_are_the_loop(activation: Activation) -> None:
    torch.manual_seed(0)
    layer = MoE(6, 8, 4, 2, activation=activation, bias=True, load_balance_coefficient=0).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    mask = torch.arange(9) != 3
    experts, biases = layer.experts, layer.output_biases
    assert biases is not None and experts.up_bias is not None
    route = layer.router(x)
    expected = []
    for t in range(9):
        total = torch.zeros(6, dtype=torch.float64)
        for e, weight in zip(route.indices[t].tolist(), route.weights[t], strict=True):
            gate = None if experts.gate is None else experts.gate[e] @ x[t] + experts.gate_bias[e]
            units = activated(activation, experts.up[e] @ x[t] + experts.up_bias[e], gate)
            total = total + weight * (experts.down[e] @ units + biases.weight[e])
        expected.append(total * mask[t])
    expected = torch.stack(expected)
    found = layer(x, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(9, 6, dtype=torch.float64)
    leaves = list(layer.parameters())
    for one, reference in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, reference, rtol=1e-10, atol=1e-12)


def test_biases_with_a_capacity_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bias=True with capacity_factor=1.0: .*legal: capacity_factor=None"):
        MoE(6, 8, 4, 2, 1.0, bias=True)
