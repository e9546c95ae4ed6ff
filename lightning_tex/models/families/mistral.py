"""Mistral: a dense decoder as Llama is, with a window on attention in its first version."""

from __future__ import annotations

from lightning_tex.models.families.family import SIZES, Fixed
from lightning_tex.models.families.llama import Llama


class Mistral(Llama):
    """``MistralForCausalLM``."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    fields = (*SIZES, Fixed("hidden_act", "silu"), Fixed("sliding_window", None, absent=4096))
