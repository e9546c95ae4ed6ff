"""One MoE layer on a GPU, forward and backward, against fp64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.on_a_gpu import DEVICE, close
from torch import Tensor

from lightning_tex.moe import MoE, auxiliary_loss

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DISPATCHERS = {"dropless": None, "capacity": 1.0, "roomy": 4.0}


def outcome(layer: MoE, x: Tensor, upstream: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    loss = (y.float() * upstream.float()).sum() + auxiliary_loss(layer)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return {"output": y, "gradient of the input": x.grad, **gradients}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
# tokens, experts, k; few tokens leave experts without any
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(96, 8, 2), (6, 16, 1), (64, 4, 4)])
def test_a_layer_is_that_of_the_cpu(dispatcher: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(1)
    layer = MoE(32, 64, experts, top_k, DISPATCHERS[dispatcher], "swiglu", norm_topk_prob=top_k > 1)
    with torch.no_grad():
        layer.router.weight.mul_(20)  # no near ties: rounding must not change who goes where
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(dtype))
    x, upstream = torch.randn(2, tokens, 32).to(dtype).unbind()
    mask = torch.arange(tokens) % 5 != 0
    expected = outcome(copy.deepcopy(layer).double(), x.double(), upstream.double(), mask)
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.to(DEVICE, torch.float32 if "router" in name and dtype.itemsize < 4 else dtype)
    found = outcome(layer, x.to(DEVICE), upstream.to(DEVICE), mask.to(DEVICE))
    for what, value in expected.items():
        close(found[what], value, TOLERANCE[dtype], f"{what} in {dtype}, {dispatcher}")


def test_a_layer_without_tokens_works() -> None:
    layer = MoE(32, 64, 4, 2, load_balance_coefficient=0.0).to(DEVICE)
    x = torch.zeros(0, 32, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 32)
