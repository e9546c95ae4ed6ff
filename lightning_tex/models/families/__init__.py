"""Families of published models: a file for each, with its configuration and its names in files, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.deepseek_v2 import DeepSeekV2
from lightning_tex.models.families.deepseek_v3 import DeepSeekV3
from lightning_tex.models.families.family import Family
from lightning_tex.models.families.glm4_moe import GLM4MoE
from lightning_tex.models.families.gpt_oss import GptOss
from lightning_tex.models.families.granite_moe import GraniteMoE
from lightning_tex.models.families.llama import Llama
from lightning_tex.models.families.mistral import Mistral
from lightning_tex.models.families.mixtral import Mixtral
from lightning_tex.models.families.olmoe import OLMoE
from lightning_tex.models.families.phi_moe import PhiMoE
from lightning_tex.models.families.qwen2_moe import Qwen2MoE
from lightning_tex.models.families.qwen3 import Qwen3
from lightning_tex.models.families.qwen3_moe import Qwen3MoE
from lightning_tex.parallel.errors import UserValueError

# In the order in which they are tried for a decoder that began from none.
_ALL = (
    Llama(), Mistral(), Qwen3(),
    Mixtral(), Qwen2MoE(), Qwen3MoE(), OLMoE(), DeepSeekV2(), DeepSeekV3(), GLM4MoE(), GptOss(), GraniteMoE(), PhiMoE(),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_of(theirs: Mapping[str, Any], where: str) -> Family:
    """The family that a ``config.json`` is of.

    Raises:
        ValueError: one that is not known, with those that are.
    """
    name = theirs.get("model_type")
    if name not in FAMILIES:
        raise UserValueError(f"{where} is of model_type={name!r}; known families: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_that_expresses(config: DecoderConfig) -> Family:
    """The first family that has a decoder of this configuration.

    Raises:
        ValueError: none has, with the reasons of each.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            family.described(config)
        except UserValueError as error:
            reasons.append(str(error))
        else:
            return family
    raise UserValueError(f"no known family has a decoder like this one: {'; '.join(reasons)}")
