"""Decoders with the weights of tiny models that transformers makes give their logits: each family, awkward sizes."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    kind: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    names: Mapping[str, str] = {}
    length: int = 23


SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6}
DENSE = {"dim": 24, "hidden_dim": 20, "num_layers": 3, "num_heads": 6, "tie_embeddings": False}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
MOE = {"num_kv_heads": 2, "num_experts": 5, "top_k": 2, "moe_every": 1}

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
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    theirs = random_model(family.kind, **family.theirs)
    decoder = with_the_weights_of(theirs, DecoderConfig(VOCABULARY, **family.ours), family.names)
    assert relative_difference(decoder, theirs, family.length) < 1e-5
