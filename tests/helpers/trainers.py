"""Trainers that say nothing, and what a module has after a fit, whole."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_tex import TexMoEStrategy
from lightning_tex.parallel.sharding import parameter_shardings

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet(**flags: Any) -> L.Trainer:
    """A Trainer on the CPU that neither logs nor draws, and writes checkpoints only where a callback does."""
    saves = any(isinstance(callback, ModelCheckpoint) for callback in flags.get("callbacks") or [])
    return L.Trainer(**{**QUIET, "enable_checkpointing": saves, **flags})


def silence() -> None:
    """Keep Lightning's advice out of the ranks' output."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def gathered(
    module: L.LightningModule, trainer: L.Trainer, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Copies of all parameters by name, whole, under any strategy; on a sharded module collective.

    Args:
        tensors: by name, instead of the parameters: as these are shaped but for dims added at the end.
    """
    tensors = dict(module.named_parameters()) if tensors is None else tensors
    if not isinstance(trainer.strategy, TexMoEStrategy):
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    shardings = parameter_shardings(module, trainer.strategy.topology)
    return {name: sharding.gather(tensors[name].detach()).clone() for name, sharding in shardings.items()}
