"""Qwen3-MoE: experts in some blocks or all, and norms of queries and keys, head by head (arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.families.family import SIZES, Field, Fixed
from lightning_tex.models.families.qwen2_moe import Qwen2MoE


class Qwen3MoE(Qwen2MoE):
    """``Qwen3MoeForCausalLM``."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    fields = (
        *SIZES,
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Field("num_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "top_k"),
        Field("moe_intermediate_size", "expert_hidden_dim"),
        Field("norm_topk_prob", "norm_topk_prob", False),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.001),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), "qk_norm": "head", "shared_expert_gate": False}
