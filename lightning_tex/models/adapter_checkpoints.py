"""What a checkpoint of a LoRA run says of its adapters and of the model that they belong to, and both together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_tex.lora import LoRAConfig, apply_lora
from lightning_tex.lora.merging import MergedWeights
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder
from lightning_tex.models.families.family import Family
from lightning_tex.models.pretrained_model import PREFIX, family_weights
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.folder import PretrainedFolder
from lightning_tex.pretrained.reading import PretrainedWeights
from lightning_tex.saving.model_state import Source

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
                "the checkpoint is of a run without lora, and the model has adapters; legal: `lightning-tex export` "
                "it, and pretrained=that folder"
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


def merged_weights(checkpoint: Source, entry: Mapping[str, Any], config: DecoderConfig, family: Family) -> Source:
    """All weights of a checkpoint's model with its adapters merged, whether it has them or adapters alone.

    Raises:
        ValueError: the published model that the adapters belong to is not where it was, or has changed.
    """
    base = checkpoint if entry["fingerprint"] is None else _base(entry, config, family)
    with torch.device("meta"):
        decoder = Decoder(config)
        apply_lora(decoder, LoRAConfig(**entry["config"]))
    return MergedWeights(base, checkpoint, decoder, PREFIX)


def _base(entry: Mapping[str, Any], config: DecoderConfig, family: Family) -> PretrainedWeights:
    path = Path(entry["folder"])
    if not path.is_dir():
        raise UserValueError(f"the checkpoint's adapters belong to the weights in {path}, which is not there any more")
    folder = PretrainedFolder(path)
    if folder.fingerprint != entry["fingerprint"]:
        raise UserValueError(f"the checkpoint's adapters belong to the weights in {path}, which have changed since")
    return family_weights(family, config, folder)
