"""Decoders with the weights of tiny models that transformers makes give their logits: each family, awkward sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from helpers.published import VOCABULARY, random_model, relative_difference, with_the_weights_of

from lightning_tex.models import DecoderConfig


class Family(NamedTuple):
    """A family's model there and here.

    Args:
        kind: its name in transformers.
        theirs: sizes there.
        ours: of the decoder.
        names: a pattern in a name there, and what it is here.
        length: of the sequences that are compared.
        norms_from_one: norms multiply by 1 and their weight there.
    """

    kind: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    names: Mapping[str, str] = {}
    length: int = 23
    norms_from_one: bool = False


SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6}
DENSE = {"dim": 24, "hidden_dim": 20, "num_layers": 3, "num_heads": 6, "tie_embeddings": False}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
MOE = {"num_kv_heads": 2, "num_experts": 5, "top_k": 2, "moe_every": 1}
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.4,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "factor": 4.0,
    "original_max_position_embeddings": 32, "short_mscale": 1.2, "long_mscale": 1.4,
}  # fmt: skip
LATENT_NAMES = {
    r"self_attn\.q_a_proj\.": "attention.query_latent.",
    r"self_attn\.q_a_layernorm\.": "attention.query_latent_norm.",
    r"self_attn\.q_b_proj\.": "attention.query.",
    r"self_attn\.kv_a_proj_with_mqa\.": "attention.key_value_latent.",
    r"self_attn\.kv_a_layernorm\.": "attention.key_value_latent_norm.",
    r"self_attn\.kv_b_proj\.": "attention.key_value.",
}
SHARED_NAMES = {
    r"mlp\.shared_experts\.(\w+)_proj\.": r"mlp.shared.\1.",
    r"mlp\.gate\.e_score_correction_bias": "mlp.router.correction_bias",
}

FAMILIES = {
    "Llama": Family(
        "Llama",
        {**SIZES, **GROUPED, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": True},
        {**DENSE, "num_kv_heads": 2, "norm_eps": 1e-2, "attention_bias": True, "attention_out_bias": True,
         "tie_embeddings": True},
    ),
    "Mistral, wide heads": Family(
        "Mistral",
        {**SIZES, **GROUPED, "head_dim": 14, "rms_norm_eps": 1e-6, "sliding_window": None},
        {**DENSE, "num_kv_heads": 2, "head_dim": 14, "norm_eps": 1e-6},
    ),
    "Qwen3": Family(
        "Qwen3",
        {**SIZES, **GROUPED, "head_dim": 6, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default",
         "rope_theta": 700.0}},
        {**DENSE, "num_kv_heads": 2, "head_dim": 6, "norm_eps": 1e-3, "qk_norm": "head", "rope_base": 700.0},
    ),
    "Mixtral": Family(
        "Mixtral",
        {**SIZES, **GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2},
        {**DENSE, **MOE, "norm_topk_prob": True},
    ),
    "Qwen2-MoE": Family(
        "Qwen2Moe",
        {**SIZES, **GROUPED, **EXPERTS, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 9,
         "decoder_sparse_step": 2, "qkv_bias": True, "norm_topk_prob": False},
        {**DENSE, **MOE, "moe_every": 2, "expert_hidden_dim": 7, "shared_expert_hidden_dim": 9, "norm_eps": 1e-6,
         "shared_expert_gate": True, "attention_bias": True},
        {r"mlp\.shared_expert_gate\.": "mlp.shared.output_gate.",
         r"mlp\.shared_expert\.(\w+)_proj\.": r"mlp.shared.\1."},
    ),
    "Qwen3-MoE": Family(
        "Qwen3Moe",
        {**SIZES, **GROUPED, **EXPERTS, "head_dim": 10, "moe_intermediate_size": 7, "norm_topk_prob": True,
         "mlp_only_layers": [1]},
        {**DENSE, **MOE, "head_dim": 10, "expert_hidden_dim": 7, "norm_topk_prob": True, "moe_layers": [0, 2],
         "qk_norm": "head", "norm_eps": 1e-6},
    ),
    "OLMoE": Family(
        "Olmoe",
        {**SIZES, **GROUPED, **EXPERTS, "clip_qkv": 0.9, "norm_topk_prob": False, "attention_bias": True},
        {**DENSE, **MOE, "qk_norm": "full", "clip_qkv": 0.9, "attention_bias": True, "attention_out_bias": True},
    ),
    "DeepSeek-V2": Family(
        "DeepseekV2",
        {**SIZES, **LATENT, "q_lora_rank": None, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 3,
         "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7, "n_shared_experts": 2,
         "moe_intermediate_size": 7, "first_k_dense_replace": 1,
         "rope_parameters": {**YARN, "rope_theta": 10000.0}},
        {**DENSE, **LATENT, "num_experts": 6, "top_k": 3, "moe_every": 1, "first_dense_layers": 1, "norm_eps": 1e-6,
         "router": {"name": "softmax", "init_args": {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7}},
         "expert_hidden_dim": 7, "shared_expert_hidden_dim": 14, "rope_scaling": YARN, "rope_interleaved": True},
        {**LATENT_NAMES, **SHARED_NAMES},
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3",
        {**SIZES, **LATENT, "num_key_value_heads": 6, "q_lora_rank": 5, "n_routed_experts": 6,
         "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5,
         "n_shared_experts": 1, "moe_intermediate_size": 7,
         "first_k_dense_replace": 1, "attention_bias": True, "num_mtp_layers": 0,
         "rope_parameters": {**YARN, "rope_theta": 10000.0}},
        {**DENSE, **LATENT, "q_lora_rank": 5, "num_experts": 6, "top_k": 2, "moe_every": 1, "first_dense_layers": 1,
         "norm_eps": 1e-6, "norm_topk_prob": True, "attention_bias": True,
         "router": {"name": "sigmoid", "init_args": {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}},
         "expert_hidden_dim": 7, "shared_expert_hidden_dim": 7, "rope_scaling": YARN, "rope_interleaved": True},
        {**LATENT_NAMES, **SHARED_NAMES},
    ),
    "GLM-4-MoE": Family(
        "Glm4Moe",
        {**SIZES, **GROUPED, "head_dim": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2,
         "topk_group": 1, "routed_scaling_factor": 1.5, "n_shared_experts": 1, "moe_intermediate_size": 7,
         "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {**DENSE, "num_kv_heads": 2, "head_dim": 8, "num_experts": 6, "top_k": 2, "moe_every": 1,
         "first_dense_layers": 1, "norm_eps": 1e-5, "norm_topk_prob": True, "attention_bias": True, "qk_norm": "head",
         "router": {"name": "sigmoid", "init_args": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}},
         "expert_hidden_dim": 7, "shared_expert_hidden_dim": 7, "partial_rotary_factor": 0.5},
        SHARED_NAMES,
    ),
    "gpt-oss": Family(
        "GptOss",
        {**SIZES, **GROUPED, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True,
         "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                             "truncate": False, "rope_theta": 10000.0, "beta_fast": 32.0, "beta_slow": 1.0}},
        {**DENSE, **MOE, "head_dim": 8, "norm_topk_prob": True, "sliding_window": 4, "attention_sinks": True,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True,
         "attention_out_bias": True, "router": {"name": "softmax", "init_args": {"bias": True}}, "expert_bias": True,
         "activation": "clamped_swiglu", "norm_eps": 1e-5,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                          "truncate": False}},
        {r"self_attn\.sinks": "attention.sinks.weight", r"experts\.down_proj_bias": "output_biases.weight"},
    ),
    "Granite-MoE": Family(
        "GraniteMoe",
        {**SIZES, **GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2, "embedding_multiplier": 3.0,
         "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.5, "tie_word_embeddings": True},
        {**DENSE, **MOE, "norm_topk_prob": True, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
         "residual_multiplier": 0.3, "logits_scaling": 2.5, "norm_eps": 1e-6, "tie_embeddings": True},
        {r"block_sparse_moe\.router\.": "mlp.router.", r"block_sparse_moe\.experts\.": "mlp.experts.",
         r"experts\.down_proj$": "experts.down"},
    ),
    "Phi-MoE": Family(
        "Phimoe",
        {**SIZES, **GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True,
         "lm_head_bias": True, "router_jitter_noise": 0.2,
         "rope_parameters": {**LONGROPE, "rope_theta": 10000.0}},
        {**DENSE, **MOE, "attention_bias": True, "attention_out_bias": True, "head_bias": True, "norm": "layer",
         "router": {"name": "sparsemixer", "init_args": {"jitter_eps": 0.2}}, "rope_scaling": LONGROPE},
    ),
    "OLMo 2": Family(
        "Olmo2",
        {**SIZES, **GROUPED},
        {**DENSE, "num_kv_heads": 2, "qk_norm": "full", "norm_placement": "post"},
        {"post_feedforward_layernorm": "mlp_output_norm", r"mlp_norm\.": "attention_output_norm."},
    ),
    "Gemma 2": Family(
        "Gemma2",
        {**SIZES, **GROUPED, "head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "sliding_window": 4, "tie_word_embeddings": True,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {**DENSE, "num_kv_heads": 2, "head_dim": 8, "attention_multiplier": 5**-0.5, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "sliding_window": 4, "activation": "geglu_tanh", "norm_eps": 1e-6,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "tie_embeddings": True,
         "norm_placement": "sandwich", "embedding_multiplier": 24**0.5},
        {"post_feedforward_layernorm": "mlp_output_norm", r"mlp_norm\.": "attention_output_norm.",
         "pre_feedforward_layernorm": "mlp_norm"},
        norms_from_one=True,
    ),
    "Mistral, windows": Family(
        "Mistral", {**SIZES, **GROUPED, "sliding_window": 5}, {**DENSE, "num_kv_heads": 2, "sliding_window": 5,
         "norm_eps": 1e-6},
    ),
    "Qwen2-MoE, windows in some blocks": Family(
        "Qwen2Moe",
        {**SIZES, **GROUPED, **EXPERTS, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 9,
         "qkv_bias": False, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
        {**DENSE, **MOE, "expert_hidden_dim": 7, "shared_expert_hidden_dim": 9, "norm_eps": 1e-6,
         "shared_expert_gate": True, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {r"mlp\.shared_expert_gate\.": "mlp.shared.output_gate.",
         r"mlp\.shared_expert\.(\w+)_proj\.": r"mlp.shared.\1."},
    ),
}  # fmt: skip
STRETCHED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3.0},
    "yarn, mscales": {
        "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.4, "truncate": False,
    },
    "longrope, short": {
        "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 23, "factor": 4.0,
    },
    "longrope, long": {
        "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 16, "factor": 4.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STRETCHED)
def test_stretched_rotation_is_that_of_transformers(name: str) -> None:
    scaling = {"rope_type": name.partition(",")[0], **STRETCHED[name]}
    most = {"max_position_embeddings": 16 if name == "dynamic" else 64}
    theirs = random_model(
        "Llama", **SIZES, **most, tie_word_embeddings=False, rope_parameters={"rope_theta": 100.0, **scaling}
    )
    config = DecoderConfig(VOCABULARY, **DENSE, norm_eps=1e-6, rope_base=100.0, rope_scaling=scaling)
    assert relative_difference(with_the_weights_of(theirs, config, {}), theirs) < 1e-5
    plain = with_the_weights_of(theirs, replace(config, rope_scaling=None), {})
    assert relative_difference(plain, theirs) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    theirs = random_model(family.kind, **family.theirs)
    decoder = with_the_weights_of(theirs, DecoderConfig(VOCABULARY, **family.ours), family.names, family.norms_from_one)
    assert relative_difference(decoder, theirs, family.length) < 1e-5
