"""What a checkpoint of a LoRA run says of its adapters and of the model that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_tex.lora import LoRAConfig
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.reading import PretrainedWeights

# What a checkpoint calls the entry below.
LORA = "lora"


def lora_entry(config: LoRAConfig, base: PretrainedWeights | None) -> dict[str, Any]:
    """A checkpoint's entry.

    Args:
        config: of the adapters.
        base: the published model without which they mean nothing; ``None``: the checkpoint has all weights.
    """
    fingerprint = None if base is None else base.folder.fingerprint
    folder = None if base is None else str(base.folder.path.absolute())
    return {"config": config_of(config), "folder": folder, "fingerprint": fingerprint}


def require_same_lora(
    entry: Mapping[str, Any] | None, config: LoRAConfig | None, base: PretrainedWeights | None
) -> None:
    """Refuse a checkpoint whose adapters are not the model's, or belong to another published model.

    Raises:
        ValueError: saying by what they differ.
    """
    if entry is None:
        if config is not None:
            raise UserValueError(
                "the checkpoint is of a run without lora, and the model has adapters; legal: `lightning-tex export` it, "
                "and pretrained=that folder"
            )
        return
    saved = entry["config"]
    if config is None or config_of(config) != saved:
        own = {} if config is None else config_of(config)
        differing = [name for name in saved if own.get(name) != saved[name]]
        values = ", ".join(f"lora.{name}={saved[name]!r} (the model's: {own.get(name)!r})" for name in differing)
        raise UserValueError(f"the checkpoint's adapters have {values}; legal: the same lora")
    own_fingerprint = None if base is None else base.folder.fingerprint
    if entry["fingerprint"] != own_fingerprint:
        where = "none" if base is None else str(base.folder.path)
        begun = "a model of random weights" if entry["folder"] is None else f"the weights in {entry['folder']}"
        raise UserValueError(
            f"the checkpoint's adapters belong to {begun}, and the model has pretrained={where}, which is another one; "
            "legal: the same weights (in Python: load_from_checkpoint(CHECKPOINT, config=None, pretrained=FOLDER))"
        )


def config_of(config: LoRAConfig) -> dict[str, Any]:
    """Its fields as plain data."""
    return {**asdict(config), "targets": list(config.targets)}
