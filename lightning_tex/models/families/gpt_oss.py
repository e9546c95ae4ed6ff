"""gpt-oss: sinks and alternating windows of attention, clamped swiglu, biases everywhere (arXiv 2508.10925)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import attention, embedding_and_head, norms
from lightning_tex.pretrained.rules import Rule


class GptOss(Family):
    """``GptOssForCausalLM``, with weights of 16 or 32 bits."""

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    always_routed = True
    rope_theta = 150000.0
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("head_dim", "head_dim", 64),
        Field("num_local_experts", "num_experts"),
        Field("num_experts_per_tok", "top_k"),
        Field("sliding_window", "sliding_window", 128),
        Field("attention_bias", "attention_bias", True),
        Field("attention_bias", "attention_out_bias", True),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.001),
        Fixed("hidden_act", "silu"),
        Fixed("swiglu_alpha", 1.702),
        Fixed("swiglu_limit", 7.0),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        layers = range(self.value(theirs, "num_hidden_layers"))
        alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
        return {
            **super().read(theirs),
            "layer_types": list(theirs.get("layer_types") or alternating),
            "moe_every": 1,
            "activation": "clamped_swiglu",
            "attention_sinks": True,
            "expert_bias": True,
            "norm_topk_prob": True,
            "router": {"name": "softmax", "init_args": {"bias": True}},
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        windows = [config.window(layer) for layer in range(config.num_layers)]
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        return {**super().write(config), "layer_types": kinds}

    def rules(self, config: DecoderConfig) -> Iterator[Rule]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield Rule(f"{theirs}.self_attn.sinks", (f"{ours}.attention.sinks.weight",))
            yield from norms(theirs, ours, config)
            yield from _moe(f"{theirs}.mlp", f"{ours}.mlp")


def _moe(theirs: str, ours: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule(f"{theirs}.router.{kind}", (f"{ours}.router.{kind}",))
    first, biases = (
        (f"{ours}.experts.gate", f"{ours}.experts.up"),
        (f"{ours}.experts.gate_bias", f"{ours}.experts.up_bias"),
    )
    yield Rule(f"{theirs}.experts.gate_up_proj", first, dim=1, interleaved=True, transposed=True)
    yield Rule(f"{theirs}.experts.gate_up_proj_bias", biases, dim=1, interleaved=True)
    yield Rule(f"{theirs}.experts.down_proj", (f"{ours}.experts.down",), transposed=True)
    yield Rule(f"{theirs}.experts.down_proj_bias", (f"{ours}.output_biases.weight",))
