"""Qwen3: a dense decoder with norms of queries and keys, head by head (arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Field, Fixed
from lightning_tex.models.families.llama import Llama
from lightning_tex.models.families.windows import read_windows, write_windows


class Qwen3(Llama):
    """``Qwen3ForCausalLM``."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    with_experts = ("qwen3_moe",)
    with_shared_expert = ("glm4_moe",)
    fields = (
        *SIZES,
        Field("head_dim", "head_dim", 128),
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), **read_windows(theirs), "qk_norm": "head"}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {**super().write(config), **write_windows(config)}
