"""Mistral: a dense decoder as Llama is, with a window on attention (arXiv 2310.06825)."""

from __future__ import annotations

from lightning_tex.models.families.family import SIZES, Field, Fixed
from lightning_tex.models.families.llama import Llama


class Mistral(Llama):
    """``MistralForCausalLM``."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    fields = (*SIZES, Field("sliding_window", "sliding_window", 4096), Fixed("hidden_act", "silu"))
