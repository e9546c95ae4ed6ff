"""Whether a checkpoint fits into the folders of a run, looked at before its first step, and not when it is saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.resilience.finite_watch import of_all_ranks
from lightning_tex.saving import at
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.model_state import checkpointed, model_state
from lightning_tex.saving.optimizer_state import foreseen_bytes
from lightning_tex.strategy.checkpoint_folders import saving_folders

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy


def require_room(strategy: CheckpointingStrategy, trainer: Trainer) -> None:
    """Compare the bytes of a checkpoint with those free in the run's folders, before the first step; collective.

    Raises:
        RuntimeError: a folder has no room for a single checkpoint; on all ranks.
    """
    folders = saving_folders(trainer)
    if not folders:
        return
    size = sum(of_all_ranks(_bytes_written(strategy), strategy.topology.world))
    short = strategy.broadcast(list(_short_of_room(folders, size)) if strategy.is_global_zero else None)
    for folder, free in short:
        told = f"a checkpoint of this run takes {size:,} bytes, and {folder} has {free:,} bytes free"
        if free < size:
            raise UserRuntimeError(
                f"checkpoints cannot be saved: {told}. Legal: another folder (ModelCheckpoint(dirpath=..) or "
                "Trainer(default_root_dir=..)), or Trainer(enable_checkpointing=False)"
            )
        rank_zero_warn(f"{told}: there is no room for two, and an old one is removed only when the new one is whole")


def _bytes_written(strategy: CheckpointingStrategy) -> int:
    """By this rank."""
    assert strategy.model is not None
    weights = checkpointed(strategy.model, model_state(strategy.model, strategy.topology))
    written = sum(_bytes_held(tensor) for tensor in weights.values() if tensor.writes)
    return written + (0 if strategy.stepped is None else foreseen_bytes(strategy.stepped))


def _bytes_held(tensor: GlobalTensor) -> int:
    return sum(part.extent.numel for part in tensor.parts) * tensor.dtype.itemsize


def _short_of_room(folders: Iterable[str], size: int) -> Iterator[tuple[str, int]]:
    """Folders that have no room for two checkpoints, and the bytes free there; those that cannot be asked are none."""
    for folder in folders:
        place = at(folder).absolute()
        if not isinstance(place, Path):
            continue
        existing = next((parent for parent in (place, *place.parents) if parent.exists()), None)
        if existing is not None:
            with suppress(OSError):
                free = shutil.disk_usage(existing).free
                if free < 2 * size:
                    yield folder, free
