"""Qwen2-MoE: experts beside a shared one with a gate of its own (Qwen1.5-MoE, Qwen2-57B-A14B)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import attention, dense_mlp, embedding_and_head, experts, norms, shared_expert
from lightning_tex.models.families.windows import read_windows, write_windows
from lightning_tex.pretrained.rules import Either, Rule


class Qwen2MoE(Family):
    """``Qwen2MoeForCausalLM``."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("qkv_bias", "attention_bias", True),
        Field("num_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "top_k"),
        Field("moe_intermediate_size", "expert_hidden_dim"),
        Field("shared_expert_intermediate_size", "shared_expert_hidden_dim"),
        Field("norm_topk_prob", "norm_topk_prob", False),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.001),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        layers = read_routed_layers(theirs, self.value(theirs, "num_hidden_layers"))
        return {**super().read(theirs), **layers, **read_windows(theirs), "shared_expert_gate": True}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {**super().write(config), **write_routed_layers(config), **write_windows(config)}

    def rules(self, config: DecoderConfig) -> Iterator[Rule | Either]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield from norms(theirs, ours, config)
            if not config.has_experts(layer):
                yield from dense_mlp(f"{theirs}.mlp", f"{ours}.mlp")
                continue
            yield Rule(f"{theirs}.mlp.gate.weight", (f"{ours}.mlp.router.weight",))
            yield experts(f"{theirs}.mlp.experts", f"{ours}.mlp.experts", config.num_experts)
            yield from shared_expert(theirs, ours, config, "shared_expert")
            if config.shared_expert_gate:
                yield Rule(f"{theirs}.mlp.shared_expert_gate.weight", (f"{ours}.mlp.shared.output_gate.weight",))


def read_routed_layers(theirs: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Which blocks have experts: every n-th, but for those that are named."""
    dense, step = theirs.get("mlp_only_layers") or [], theirs.get("decoder_sparse_step", 1)
    return {"moe_layers": [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]}


def write_routed_layers(config: DecoderConfig) -> dict[str, Any]:
    """What :func:`read_routed_layers` reads."""
    dense = [layer for layer in range(config.num_layers) if not config.has_experts(layer)]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
