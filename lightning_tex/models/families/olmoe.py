"""OLMoE: experts in every block, norms of queries and keys over all heads together (arXiv 2409.02060)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import attention, embedding_and_head, experts, norms
from lightning_tex.pretrained.rules import Either, Rule


class OLMoE(Family):
    """``OlmoeForCausalLM``."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    always_routed = True
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
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

    def rules(self, config: DecoderConfig) -> Iterator[Rule | Either]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield from norms(theirs, ours, config)
            yield Rule(f"{theirs}.mlp.gate.weight", (f"{ours}.mlp.router.weight",))
            yield experts(f"{theirs}.mlp.experts", f"{ours}.mlp.experts", config.num_experts)
