"""DeepSeek-V2: latent attention, a softmax over all experts, of which a token may use few groups (arXiv 2405.04434)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.deepseek_v3 import DeepSeekV3
from lightning_tex.models.families.family import Field, Fixed
from lightning_tex.parallel.errors import UserValueError

_OTHERWISE = ("rope_interleave", "norm_topk_prob", "first_k_dense_replace")
_GREEDY, _BY_GROUPS = "greedy", "group_limited_greedy"


class DeepSeekV2(DeepSeekV3):
    """``DeepseekV2ForCausalLM``."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    scores = "softmax"
    fields = (
        *(
            f
            for f in DeepSeekV3.fields
            if f.theirs not in ("rope_interleave", "norm_topk_prob", "first_k_dense_replace")
        ),
        Field("first_k_dense_replace", "first_dense_layers", 0),
        Fixed("mlp_bias", False),
        # transformers rescales no weights of this family, whatever its configuration says.
        Fixed("norm_topk_prob", False, also=(True,)),
    )

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        method = theirs.get("topk_method", _GREEDY)
        if method not in (_GREEDY, _BY_GROUPS):
            raise UserValueError(
                f"deepseek_v2 with topk_method={method!r} is not expressed here; legal: {_GREEDY!r}, {_BY_GROUPS!r}"
            )
        if method == _GREEDY:
            theirs = {**theirs, "n_group": None, "topk_group": None}
        return {**super().read(theirs), "rope_interleaved": True, "norm_topk_prob": False}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        theirs = super().write(config)
        return {**theirs, "topk_method": _BY_GROUPS if theirs["n_group"] > 1 else _GREEDY}
