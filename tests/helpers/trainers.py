"""Trainers that say nothing."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

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
