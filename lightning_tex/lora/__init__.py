"""LoRA (arXiv 2106.09685): training of low-rank adapters beside frozen matrices, on any layout."""

from lightning_tex.lora.apply import adaptable, adapter_names, apply_lora
from lightning_tex.lora.config import LoRAConfig

__all__ = ["LoRAConfig", "adaptable", "adapter_names", "apply_lora"]
