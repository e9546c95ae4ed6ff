"""Mixtral: experts in every block, a softmax over all of them, weights rescaled to sum to 1 (arXiv 2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.family import SIZES, Family, Field, Fixed
from lightning_tex.models.families.names import attention, embedding_and_head, fused_experts, norms
from lightning_tex.pretrained.rules import Either, Rule

# w1 is the gate, w3 the way up, w2 the way down.
_MATRICES = (("w1", "gate"), ("w3", "up"), ("w2", "down"))


class Mixtral(Family):
    """``MixtralForCausalLM``."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    always_routed = True
    rope_theta = 1e6
    fields: ClassVar[tuple[Field | Fixed, ...]] = (
        *SIZES,
        Field("num_local_experts", "num_experts"),
        Field("num_experts_per_tok", "top_k"),
        Field("router_aux_loss_coef", "load_balance_coefficient", 0.001),
        Field("sliding_window", "sliding_window", None),
        Fixed("hidden_act", "silu"),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read(theirs), "moe_every": 1, "norm_topk_prob": True}

    def rules(self, config: DecoderConfig) -> Iterator[Rule | Either]:
        yield from embedding_and_head(config)
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield from attention(theirs, ours, config)
            yield from norms(theirs, ours, config)
            yield from self._moe(theirs, ours, config.num_experts)

    def _moe(self, theirs: str, ours: str, count: int) -> Iterator[Rule | Either]:
        router = f"{ours}.mlp.router.weight"
        yield Either(((Rule(f"{theirs}.block_sparse_moe.gate.weight", (router,)),),
                      (Rule(f"{theirs}.mlp.gate.weight", (router,)),)))  # fmt: skip
        each = tuple(
            Rule(f"{theirs}.block_sparse_moe.experts.{e}.{name}.weight", (f"{ours}.mlp.experts.{matrix}",), expert=e)
            for e in range(count)
            for name, matrix in _MATRICES
        )
        yield Either((each, fused_experts(f"{theirs}.mlp.experts", f"{ours}.mlp.experts")))
