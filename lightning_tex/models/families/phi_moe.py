"""Phi-MoE: LayerNorm, biases of attention and head, SparseMixer's weights (Phi-3.5-MoE, arXiv 2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import Field, Fixed
from lightning_tex.models.families.mixtral import Mixtral


class PhiMoE(Mixtral):
    """``PhimoeForCausalLM``. Noise on the router's input in training is not expressed."""

    model_type = "phimoe"
    architecture = "PhimoeForCausalLM"
    fields = (
        *Mixtral.fields,
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("attention_bias", "attention_bias", False),
        Field("attention_bias", "attention_out_bias", False),
        Field("lm_head_bias", "head_bias", False),
        Fixed("input_jitter_noise", 0.0),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        noise = {"jitter_eps": theirs.get("router_jitter_noise", 0.01)}
        router = {"name": "sparsemixer", "init_args": noise}
        return {**super().read(theirs), "norm": "layer", "norm_topk_prob": False, "router": router}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        given = {} if isinstance(config.router, str) else config.router.get("init_args") or {}
        return {**super().write(config), "router_jitter_noise": given.get("jitter_eps", 0.01)}
