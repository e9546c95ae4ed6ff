"""GLM-4-MoE: sigmoid scores with a correction bias, a shared expert, dense blocks first (GLM-4.5, arXiv 2508.06471)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import (
    attention,
    corrected_router,
    dense_mlp,
    embedding_and_head,
    experts,
    norms,
    shared_expert,
)
from lightning_tex.pretrained.rules import Either, Rule


class GLM4MoE(Family):
    """``Glm4MoeForCausalLM``. The blocks that predict further tokens are left out, as transformers does."""

    model_type = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    partial_rotary_factor = 0.5
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("attention_bias", "attention_bias", False),
        Field("n_routed_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "top_k"),
        Field("moe_intermediate_size", "expert_hidden_dim"),
        Field("first_k_dense_replace", "first_dense_layers", 1),
        Field("norm_topk_prob", "norm_topk_prob", True),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        norm = {"qk_norm": "head" if theirs.get("use_qk_norm") else None}
        return {**super().read(theirs), **read_routing(theirs, "sigmoid"), **norm, "load_balance_coefficient": 0.0}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {**super().write(config), **write_routing(config), "use_qk_norm": config.qk_norm is not None}

    def left_out(self, names: Iterable[str], config: DecoderConfig) -> list[str]:
        """Blocks behind the last one, which predict further tokens."""
        numbers = ((name, re.match(r"model\.layers\.(\d+)\.", name)) for name in names)
        return [name for name, match in numbers if match and int(match[1]) >= config.num_layers]

    def rules(self, config: DecoderConfig) -> Iterator[Rule | Either]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from self.attention(theirs, ours, config)
            yield from norms(theirs, ours, config)
            if not config.has_experts(layer):
                yield from dense_mlp(f"{theirs}.mlp", f"{ours}.mlp")
                continue
            yield from corrected_router(theirs, ours, config)
            yield experts(f"{theirs}.mlp.experts", f"{ours}.mlp.experts", config.num_experts)
            yield from shared_expert(theirs, ours, config)

    def attention(self, theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
        """Of one block."""
        yield from attention(theirs, ours, config)


def read_routing(theirs: Mapping[str, Any], scores: str) -> dict[str, Any]:
    """Experts in all blocks but the first ones, in groups, and shared ones, which are one here."""
    names = ("n_group", "topk_group", "routed_scaling_factor")
    given = {name: theirs[name] for name in names if theirs.get(name) is not None}
    width = theirs["moe_intermediate_size"] * (theirs.get("n_shared_experts") or 0)
    return {"router": {"name": scores, "init_args": given}, "moe_every": 1, "shared_expert_hidden_dim": width or None}


def write_routing(config: DecoderConfig) -> dict[str, Any]:
    """What :func:`read_routing` reads, and how many blocks are dense."""
    given = {} if isinstance(config.router, str) else config.router.get("init_args") or {}
    routed = [layer for layer in range(config.num_layers) if config.has_experts(layer)]
    return {
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        **given,
        "n_shared_experts": (config.shared_expert_hidden_dim or 0) // config.expert_hidden,
        "first_k_dense_replace": routed[0] if routed else config.num_layers,
    }
