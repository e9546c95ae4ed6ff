"""Qwen3-MoE: experts in all blocks, in every n-th, or but for some, and norms of queries and keys, head by head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import (
    SIZES,
    Family,
    Field,
    Fixed,
    attention,
    dense_mlp,
    embedding_and_head,
    experts,
    norms,
)
from lightning_tex.pretrained.rules import Either, Rule


class Qwen3MoE(Family):
    """``Qwen3MoeForCausalLM``."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Field("num_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "top_k"),
        Field("moe_intermediate_size", "expert_hidden_dim"),
        Field("norm_topk_prob", "norm_topk_prob", False),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.001),
        Fixed("hidden_act", "silu"),
        Fixed("use_sliding_window", False),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        dense, step = theirs.get("mlp_only_layers") or [], theirs.get("decoder_sparse_step", 1)
        layers = range(self.value(theirs, "num_hidden_layers"))
        routed = [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
        places = {"moe_layers": routed} if dense else {"moe_every": step}
        return {**super().read(theirs), **places, "qk_norm": "head"}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        dense = [layer for layer in range(config.num_layers) if not config.has_experts(layer)]
        return {**super().write(config), "mlp_only_layers": dense, "decoder_sparse_step": 1}

    def rules(self, config: DecoderConfig) -> Iterator[Rule | Either]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield from norms(theirs, ours)
            if config.has_experts(layer):
                yield Rule(f"{theirs}.mlp.gate.weight", (f"{ours}.mlp.router.weight",))
                yield experts(f"{theirs}.mlp.experts", f"{ours}.mlp.experts", config.num_experts)
            else:
                yield from dense_mlp(f"{theirs}.mlp", f"{ours}.mlp")
