"""Adapters train on every layout as in one process: losses, gradients, their norm and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.features import FEATURES
from helpers.perturbed import Perturbed, batches, config

from lightning_tex.lora import LoRAConfig, apply_lora
from lightning_tex.lora.apply import adaptable, adapted
from lightning_tex.testing import assert_trains_alike

TED = {"devices": 4, "tensor_parallel_size": 2, "expert_parallel_size": 2}
LAYOUTS = [
    {**TED, "sequence_parallel": True, "activation_checkpointing": "communication_aware"},
    {**TED, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
    {**TED, "activation_checkpointing": "full", "zero_stage": 2, "expert_chunks": 2},
    {**TED, "expert_parallel_size": 1},
    {"devices": 2, "expert_parallel_size": 2},
]


class Adapted(Perturbed):
    """Every matrix that can have an adapter has one, and B is drawn, too, so that A has a gradient."""

    def __init__(self, features: dict[str, Any]) -> None:
        super().__init__(config(**features))
        names = apply_lora(self, LoRAConfig(rank=2, alpha=3, targets=("*",)))
        assert len(names) == len(adapted(self)) and set(names) >= set(adaptable(self))
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for one in adapted(self):
                one.adapter.a.copy_(0.2 * torch.randn(one.adapter.a.shape, generator=generator))
                one.adapter.b.copy_(0.2 * torch.randn(one.adapter.b.shape, generator=generator))


def alike(features: str, layouts: list[dict[str, Any]]) -> None:
    assert_trains_alike(lambda: Adapted(FEATURES[features]), batches(), layouts=layouts, steps=1, tolerance=1e-10)


def test_adapters_train_as_in_one_process() -> None:
    alike("shared expert", LAYOUTS[:2])


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("features", ["shared expert", "latent attention", "biases and clamps in experts"])
def test_adapters_train_as_in_one_process_on_every_layout(features: str, layout: dict[str, Any]) -> None:
    alike(features, [layout])
