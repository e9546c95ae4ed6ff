"""Checkpoints: a directory that every rank writes its part of, or one plain file; either loads on any layout."""

from lightning_tex.saving.background import Background
from lightning_tex.saving.checkpoint import Checkpoints
from lightning_tex.saving.consolidate import consolidate, consolidated, load_from_checkpoint
from lightning_tex.saving.manifest import CorruptCheckpointError
from lightning_tex.saving.places import latest
from lightning_tex.saving.side_group import SideGroup

__all__ = [
    "Background",
    "Checkpoints",
    "CorruptCheckpointError",
    "SideGroup",
    "consolidate",
    "consolidated",
    "latest",
    "load_from_checkpoint",
]
