"""OLMoE: experts in every block, norms of queries and keys over all heads together (arXiv 2409.02060)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Field, Fixed
from lightning_tex.models.families.qwen3_moe import Qwen3MoE


class OLMoE(Qwen3MoE):
    """``OlmoeForCausalLM``."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    fields = (
        *SIZES,
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Field("num_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "top_k"),
        Field("norm_topk_prob", "norm_topk_prob", False),
        Field("clip_qkv", "clip_qkv", None),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.01),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), "moe_every": 1, "qk_norm": "full"}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        others = ("mlp_only_layers", "decoder_sparse_step")
        return {name: value for name, value in super().write(config).items() if name not in others}
