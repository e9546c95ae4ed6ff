"""Llama: a dense decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import attention, dense_mlp, embedding_and_head, norms
from lightning_tex.pretrained.rules import Rule


class Llama(Family):
    """``LlamaForCausalLM``."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    with_experts: ClassVar[tuple[str, ...]] = ("mixtral",)
    with_shared_expert: ClassVar[tuple[str, ...]] = ("glm4_moe", "qwen2_moe")
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Fixed("hidden_act", "silu"),
        Fixed("mlp_bias", False),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), "num_experts": 1}

    def rules(self, config: DecoderConfig) -> Iterator[Rule]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield from norms(theirs, ours, config)
            yield from dense_mlp(f"{theirs}.mlp", f"{ours}.mlp")
