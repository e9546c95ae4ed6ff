"""Checkpoints: a directory that every rank writes its part of, or one plain file; either loads on any layout."""

from lightning_tex.saving.checkpoint import Checkpoints

__all__ = ["Checkpoints"]
