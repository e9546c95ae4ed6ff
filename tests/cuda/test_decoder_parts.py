"""What a decoder may be made of, on a GPU in bf16: loss and gradients are those of the CPU in fp32, without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.features import FEATURES
from helpers.on_a_gpu import DEVICE, no_waiting
from helpers.perturbed import Perturbed, batches, config
from torch import Tensor

from lightning_tex.layers import ParallelAttention
from lightning_tex.moe import auxiliary_loss
from lightning_tex.strategy.precision import TexMixedPrecision

# Widths that grouped kernels take. So that rounding changes no choice of experts, each token goes to all of them.
SIZES = {"dim": 32, "hidden_dim": 32, "expert_hidden_dim": 16, "top_k": 4}


def learnt(module: Perturbed, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss, _ = module._loss_sum(batch)
    (loss + auxiliary_loss(module)).backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("features", [name for name in FEATURES if name != "sigmoid router"])
def test_loss_and_gradients_are_those_of_the_cpu(features: str) -> None:
    sizes: dict[str, Any] = {**FEATURES[features], **SIZES}
    (batch,) = batches()
    expected, wanted = learnt(Perturbed(config(**sizes)), batch)
    module = Perturbed(config(**sizes))
    plugin = TexMixedPrecision("bf16-mixed", DEVICE.type)
    plugin.convert_module(module).to(DEVICE)
    there = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    with plugin.forward_context():
        loss, found = learnt(module, there)
    assert float(loss) == pytest.approx(float(expected), rel=0.01)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        error = (gradient.float().cpu() - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.2, f"{name}: {error:.3f}"


@pytest.mark.parametrize("options", [{"sinks": True}, {"window": 16}, {"window": 16, "sinks": True}], ids=str)
def test_windows_and_sinks_wait_for_nothing(options: dict[str, Any]) -> None:
    layer = ParallelAttention(128, 2, 1, **options).to(DEVICE, torch.bfloat16)
    x = torch.randn(1, 64, 128, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    layer(x).sum().backward()  # what is made once
    with no_waiting():
        layer(x).sum().backward()
