"""DeepSeek-V3: latent attention, sigmoid scores with a correction bias, groups of experts (arXiv 2412.19437)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Field, Fixed
from lightning_tex.models.families.glm4_moe import GLM4MoE, read_routing
from lightning_tex.models.families.names import latent_attention
from lightning_tex.pretrained.rules import Rule

_WITHOUT_HEAD_DIM = tuple(field for field in SIZES if field.theirs != "head_dim")


class DeepSeekV3(GLM4MoE):
    """``DeepseekV3ForCausalLM``, with weights of 16 or 32 bits. Blocks that predict further tokens are left out."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    partial_rotary_factor = 1.0
    scores: ClassVar[str] = "sigmoid"
    fields = (
        *_WITHOUT_HEAD_DIM,
        Field("attention_bias", "attention_bias", False),
        Field("kv_lora_rank", "kv_lora_rank"),
        Field("q_lora_rank", "q_lora_rank", None),
        Field("qk_nope_head_dim", "qk_nope_head_dim"),
        Field("qk_rope_head_dim", "qk_rope_head_dim"),
        Field("v_head_dim", "v_head_dim"),
        Field("n_routed_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "top_k"),
        Field("moe_intermediate_size", "expert_hidden_dim"),
        Field("first_k_dense_replace", "first_dense_layers", 3),
        Field("norm_topk_prob", "norm_topk_prob", True),
        Field("rope_interleave", "rope_interleaved", True),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), **read_routing(theirs, self.scores)}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        others = {name: value for name, value in super().write(config).items() if name != "use_qk_norm"}
        return {**others, "head_dim": config.qk_rope_head_dim}

    def attention(self, theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
        yield from latent_attention(theirs, ours, config)
