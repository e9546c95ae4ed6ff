"""What a decoder may be made of, on layouts: loss, gradients and parameters after a step are those of one process."""

from __future__ import annotations

import pytest
from helpers.cases import in_full
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


CASES = [(features, place) for features in FEATURES for place in range(len(LAYOUTS))]
# The first layout, which has all at once; for every third of the features the plain one, too.
DEFAULT = [(features, place) for number, features in enumerate(FEATURES) for place in range(1 if number % 3 else 2)]


@pytest.mark.parametrize("case", in_full(CASES, DEFAULT), ids=str)
def test_trains_as_in_one_process(case: tuple[str, int]) -> None:
    features, place = case

    def build() -> Perturbed:
        return Perturbed(config(**FEATURES[features]))

    assert_trains_alike(build, batches(), layouts=[LAYOUTS[place]], steps=1, tolerance=1e-10)
