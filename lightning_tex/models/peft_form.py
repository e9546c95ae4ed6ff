"""Adapters as PEFT writes and loads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule

from lightning_tex.lora import LoRAConfig
from lightning_tex.lora.apply import Adapted, adapted
from lightning_tex.models.exporting import on_its_ranks
from lightning_tex.models.families import family_that_expresses
from lightning_tex.models.pretrained_model import PREFIX, Origin, bind
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.topology import Topology
from lightning_tex.pretrained.rules import Bindings, Rule
from lightning_tex.pretrained.writing import Weights, as_json, write_folder
from lightning_tex.saving.model_state import model_state

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHT = ".weight"


def save_adapters(
    module: LightningModule, folder: str | os.PathLike[str], lora: LoRAConfig, config: Any, origin: Origin | None
) -> None:
    """Write a module's adapters; collective over the ranks that hold it.

    Raises:
        ValueError: an adapted matrix that is not one linear layer's in the family, such as those of experts.
        RuntimeError: a rank cannot write.
    """
    family = family_that_expresses(config) if origin is None else origin.family
    bindings, _ = bind(family, config)
    decoder = module.decoder
    assert isinstance(decoder, torch.nn.Module)
    names = {one.prefix: _their_layer(one, bindings) for one in adapted(decoder)}

    def save(folder: Path, topology: Topology, broadcast: Any) -> None:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in model_state(module, topology).items()}
        shapes = {f"{prefix}.{factor}": tensors[f"{prefix}.{factor}"].shape for prefix in names for factor in "ab"}
        rules = Bindings.of(_rules(names), shapes)
        dtype = tensors[next(iter(shapes))].dtype
        files = {ADAPTER_CONFIG: as_json(_described(lora, sorted(names.values()), origin))}
        write_folder(
            folder, Weights(rules, tensors, dtype, sys.maxsize, ADAPTER_WEIGHTS), files, topology.world, broadcast
        )

    on_its_ranks(module, folder, save)


def _their_layer(one: Adapted, bindings: Bindings) -> str:
    """The layer in transformers whose weight an adapted matrix is."""
    pieces = bindings.pieces[one.weight]
    stored = bindings.stored[pieces[0].stored]
    plain = len(pieces) == 1 and not pieces[0].transposed and pieces[0].target == Extent.whole(stored)
    if not plain or not pieces[0].stored.endswith(_WEIGHT):
        raise UserValueError(
            f"{one.weight} is no linear layer's weight in transformers, so PEFT's form has no adapter of it; legal: "
            "save_pretrained, which merges, or lora.targets of attention and dense layers alone"
        )
    return pieces[0].stored.removesuffix(_WEIGHT)


def _rules(layers: dict[str, str]) -> Iterator[Rule]:
    for prefix, layer in layers.items():
        for factor in ("a", "b"):
            yield Rule(f"base_model.model.{layer}.lora_{factor.upper()}.weight", (f"{prefix}.{factor}",))


def _described(lora: LoRAConfig, layers: list[str], origin: Origin | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if origin is None else origin.name,
        "revision": None if origin is None else origin.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
