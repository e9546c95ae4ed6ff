"""What a decoder may be made of, in 16 bits: gradients in every part, and the loss of fp32 within their rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.features import FEATURES
from helpers.perturbed import Perturbed, batches, config

from lightning_tex.moe import auxiliary_loss
from lightning_tex.strategy.precision import TexHalfPrecision, TexMixedPrecision

# So that rounding changes no choice of experts.
ALL_EXPERTS = {"top_k": 4}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("features", FEATURES)
def test_losses_and_gradients(features: str, precision: Any) -> None:
    (batch,) = batches()
    limited = features == "sigmoid router"  # its groups allow two experts
    given = {**FEATURES[features], **({} if limited else ALL_EXPERTS)}
    exact = Perturbed(config(**given))
    with torch.no_grad():
        expected, _ = exact._loss_sum(batch)
    module = Perturbed(config(**given))
    plugin = TexMixedPrecision(precision, "cpu") if precision == "bf16-mixed" else TexHalfPrecision(precision)
    plugin.convert_module(module)
    with plugin.forward_context():
        loss, _ = module._loss_sum(batch)
        (loss + auxiliary_loss(module)).backward()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=0.03 if limited else 0.003)
    assert all(buffer.dtype == torch.float32 for buffer in module.buffers())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
