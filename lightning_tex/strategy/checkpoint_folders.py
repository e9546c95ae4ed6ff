"""The folders that a Trainer's checkpoints lie in, by what Lightning has made of its options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks.on_exception_checkpoint import OnExceptionCheckpoint

from lightning_tex.saving import Location, Place, at, exactly

# What Lightning adds to a folder of its own choice.
_CHECKPOINTS = "checkpoints"
_FILE_URL = re.compile(r"/file:(/.*)")
_VERSION = re.compile(r"version_(\d+)")


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that save."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]


def take_file_urls_for_paths(trainer: Trainer) -> None:
    """``dirpath="file:///data"`` is ``/data``: Lightning makes of it a folder ``file:`` where the run was started."""
    for callback in model_checkpoints(trainer):
        if match := _FILE_URL.search(str(callback.dirpath or "")):
            callback.dirpath = match[1]


def saving_folders(trainer: Trainer) -> list[str]:
    """Where the callbacks are going to save, resolved by their ``setup``."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    saving = [c for c in model_checkpoints(trainer) if c.save_top_k != 0 or c.save_last]
    return list(dict.fromkeys(str(callback.dirpath) for callback in saving))


def places(trainer: Trainer) -> list[Place]:
    """Where a state of the run may lie: in a folder of any ModelCheckpoint, in the default one, and what SLURM's
    requeueing and ``OnExceptionCheckpoint`` leave behind.

    Where the callbacks' folder is a logger's ``version_N`` and nothing is in it yet, the newest earlier version with
    something in it counts too: a command that is given again gets a new version.
    """
    root = at(trainer.default_root_dir)
    callbacks = [callback for callback in model_checkpoints(trainer) if callback.dirpath is not None]
    found = [Place(at(str(callback.dirpath)), suffix=callback.FILE_EXTENSION) for callback in callbacks]
    found += [earlier for place in found for earlier in _earlier_versions(place)]
    found += [Place(root / _CHECKPOINTS), Place(root, "hpc_ckpt_*")]
    found += [exactly(at(c.ckpt_path)) for c in _on_exception(trainer)]
    return list(dict.fromkeys(found))


def saves_on_exception(trainer: Trainer) -> bool:
    """Whether Lightning is to go on by itself from what an earlier run left when it failed."""
    return bool(_on_exception(trainer))


def _on_exception(trainer: Trainer) -> list[OnExceptionCheckpoint]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, OnExceptionCheckpoint)]


def _earlier_versions(place: Place) -> Iterator[Place]:
    version, runs = _VERSION.fullmatch(place.folder.parent.name), place.folder.parent.parent
    if version is None or place.folder.name != _CHECKPOINTS or not runs.is_dir() or _has_entries(place.folder):
        return
    numbers = [int(match[1]) for match in map(_VERSION.fullmatch, (entry.name for entry in runs.iterdir())) if match]
    for number in sorted((n for n in numbers if n < int(version[1])), reverse=True):
        folder = runs / f"version_{number}" / _CHECKPOINTS
        if _has_entries(folder):
            yield place._replace(folder=folder)
            return


def _has_entries(folder: Location) -> bool:
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def checkpoint_folder(trainer: Trainer) -> Location | None:
    """Where the run's checkpoints lie; ``None``: the Trainer has them switched off."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
    if not callbacks or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return at(callback.dirpath)
    return at(trainer.default_root_dir) / "checkpoints"
