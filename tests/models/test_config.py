"""A decoder's configuration: what there cannot be is refused by name, and what there can be travels as plain values."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from helpers.features import FEATURES
from helpers.perturbed import VOCABULARY, config

from lightning_tex.models import DecoderConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-6, "head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"norm": "batch"}, "norm has 'batch'; legal: 'rms', 'layer'"),
        ({"qk_norm": "all"}, "qk_norm has 'all'; legal: 'head', 'full'"),
        ({"norm_placement": "inside"}, "norm_placement has 'inside'; legal: 'pre', 'post', 'sandwich'"),
        ({"layer_types": ["local", "full_attention"]}, "layer_types has 'local'; legal: 'full_attention', 'sliding"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; legal with num_layers=2: as many"),
        ({"moe_layers": [0, 2]}, "moe_layers has 2; legal with num_layers=2: 0 to 1"),
        ({"kv_lora_rank": 4, "v_head_dim": 2}, "kv_lora_rank, v_head_dim without qk_nope_head_dim, qk_rope_head_dim;"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5; legal: above 0, at most 1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling has rope_type=None; legal: 'linear', 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta": 1}}, "has unknown beta, no original_max_pos"),
    ],
)
def test_what_there_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        config(**changes)


@pytest.mark.parametrize("features", FEATURES)
def test_it_is_plain_values(features: str) -> None:
    """As checkpoints and recipes have it."""
    one = config(**FEATURES[features])
    assert DecoderConfig(**json.loads(json.dumps(asdict(one)))) == one


def test_which_blocks_have_experts_and_windows() -> None:
    every = DecoderConfig(VOCABULARY, num_layers=6, num_experts=2, moe_every=2, first_dense_layers=2)
    assert [every.has_experts(layer) for layer in range(6)] == [False, False, False, True, False, True]
    listed = DecoderConfig(
        VOCABULARY, num_layers=3, num_experts=2, moe_layers=[0, 2], sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    assert [listed.has_experts(layer) for layer in range(3)] == [True, False, True]
    assert [listed.window(layer) for layer in range(3)] == [None, 5, None]
    some = listed.of_blocks([1, 2])
    assert some.block_kinds() == listed.block_kinds()[1:]
