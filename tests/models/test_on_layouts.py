"""What a decoder may be made of, on layouts: loss, gradients and parameters after a step are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.perturbed import Perturbed, batches, config

from lightning_tex.testing import assert_trains_alike

FEATURES: dict[str, dict[str, Any]] = {
    "head norms, biases, widths": {
        "qk_norm": "head", "head_dim": 10, "attention_bias": True, "attention_out_bias": True, "norm_eps": 1e-2,
        "expert_hidden_dim": 6, "moe_layers": [1], "tie_embeddings": False,
    },
    "shared expert": {"shared_expert_hidden_dim": 10, "shared_expert_gate": True, "first_dense_layers": 1},
    "sigmoid router": {
        "router": {"name": "sigmoid", "init_args": {"bias": True, "routed_scaling_factor": 1.7, "n_group": 2,
                                                    "topk_group": 1}},
        "norm_topk_prob": True,
    },
    "windows, sinks, caps, partial rotation": {
        "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"], "attention_sinks": True,
        "final_logit_softcapping": 1.5, "partial_rotary_factor": 0.4, "head_dim": 10, "rope_interleaved": True,
    },
    "capped scores with sinks": {"attention_sinks": True, "attn_logit_softcapping": 0.4, "attention_multiplier": 1.3},
    "latent attention": {
        "kv_lora_rank": 7, "q_lora_rank": 5, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 3,
        "attention_bias": True, "rope_interleaved": True, "moe_layers": [1],
    },
    "latent attention without a latent of queries": {
        "kv_lora_rank": 7, "qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "v_head_dim": 9, "moe_every": 2,
    },
    "norms over all heads, clipped": {"qk_norm": "full", "clip_qkv": 0.7},
}  # fmt: skip
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
