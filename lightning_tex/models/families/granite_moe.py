"""Granite-MoE: experts in every block, and multipliers of embeddings, scores, residual branches and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import attention, embedding_and_head, norms
from lightning_tex.pretrained.rules import Rule


class GraniteMoE(Family):
    """``GraniteMoeForCausalLM``."""

    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    always_routed = True
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("num_local_experts", "num_experts"),
        Field("num_experts_per_tok", "top_k"),
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Field("embedding_multiplier", "embedding_multiplier", 1.0),
        Field("attention_multiplier", "attention_multiplier", 1.0),
        Field("residual_multiplier", "residual_multiplier", 1.0),
        Field("logits_scaling", "logits_scaling", 1.0),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.001),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), "moe_every": 1, "norm_topk_prob": True}

    def rules(self, config: DecoderConfig) -> Iterator[Rule]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield from norms(theirs, ours, config)
            theirs, ours = f"{theirs}.block_sparse_moe", f"{ours}.mlp"
            yield Rule(f"{theirs}.router.layer.weight", (f"{ours}.router.weight",))
            yield Rule(f"{theirs}.input_linear.weight", (f"{ours}.experts.gate", f"{ours}.experts.up"), dim=1)
            yield Rule(f"{theirs}.output_linear.weight", (f"{ours}.experts.down",))
