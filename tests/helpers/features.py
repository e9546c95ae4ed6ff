"""What a decoder may be made of: by name, the fields of its configuration, over those of ``helpers.perturbed``."""

from __future__ import annotations

from typing import Any

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
    "biases and clamps in experts": {
        "expert_bias": True, "activation": "clamped_swiglu", "mlp_bias": True, "moe_layers": [1],
        "router": {"name": "softmax", "init_args": {"bias": True}},
    },
    "multipliers, norms with biases before and after, biased head": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.7, "norm": "layer",
        "norm_placement": "sandwich", "head_bias": True, "tie_embeddings": False, "activation": "geglu",
        "router": {"name": "sparsemixer", "init_args": {"jitter_eps": 0.3}},
    },
    "latent attention": {
        "kv_lora_rank": 7, "q_lora_rank": 5, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 3,
        "attention_bias": True, "rope_interleaved": True, "moe_layers": [1],
    },
    "latent attention without a latent of queries": {
        "kv_lora_rank": 7, "qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "v_head_dim": 9, "moe_every": 2,
    },
    "norms over all heads, clipped": {"qk_norm": "full", "clip_qkv": 0.7},
}  # fmt: skip
