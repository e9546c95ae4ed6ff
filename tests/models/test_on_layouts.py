"""What a decoder may be made of, on layouts: loss, gradients and parameters after a step are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.features import FEATURES
from helpers.perturbed import Perturbed, batches, config

from lightning_tex.testing import assert_trains_alike

TED = {"devices": 4, "tensor_parallel_size": 2, "expert_parallel_size": 2}
LAYOUTS = [
    {**TED, "sequence_parallel": True, "activation_checkpointing": "communication_aware"},
    TED,
    {**TED, "sequence_parallel": True, "activation_checkpointing": "full"},
    {**TED, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
    {"devices": 4, "tensor_parallel_size": 1, "expert_parallel_size": 2},
]


@pytest.mark.parametrize("features", FEATURES)
def test_trains_as_in_one_process(features: str) -> None:
    alike(features, LAYOUTS[:2])


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS[2:], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_trains_as_in_one_process_on_every_layout(features: str, layout: dict[str, Any]) -> None:
    alike(features, [layout])


def alike(features: str, layouts: list[dict[str, Any]]) -> None:
    def build() -> Perturbed:
        return Perturbed(config(**FEATURES[features]))

    assert_trains_alike(build, batches(), layouts=layouts, steps=1, tolerance=1e-10)
