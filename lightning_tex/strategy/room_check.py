"""Whether a checkpoint fits into the folders of a run, looked at once its states exist, and not when it is saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.resilience.finite_watch import of_all_ranks
from lightning_tex.saving import at
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.model_state import model_state
from lightning_tex.saving.optimizer_state import optimizer_state
from lightning_tex.strategy.checkpoint_folders import saving_folders

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy


class RoomCheck:
    """Compares the bytes of a checkpoint with those free in the run's folders, once in every fit.

    Args:
        strategy: of the run.
    """

    def __init__(self, strategy: CheckpointingStrategy) -> None:
        self._strategy = strategy
        self._first_step: int | None = None

    def fit_begins(self, step: int) -> None:
        """Look after the next step.

        Args:
            step: optimizer steps done.
        """
        self._first_step = step

    def step_boundary(self, step: int) -> None:
        """Between two batches of a fit; collective.

        Raises:
            RuntimeError: a folder has no room for a single checkpoint; on all ranks.
        """
        optimizer = self._strategy.stepped
        if self._first_step is None or step <= self._first_step or optimizer is None:
            return
        self._first_step = None
        strategy = self._strategy
        assert strategy.lightning_module is not None and strategy.model is not None
        folders = saving_folders(strategy.lightning_module.trainer)
        if not folders:
            return
        described = {"model": model_state(strategy.model, strategy.topology), "states": optimizer_state(optimizer)}
        size = sum(of_all_ranks(_bytes_written(described), strategy.topology.world))
        short = strategy.broadcast(list(_short_of_room(folders, size)) if strategy.is_global_zero else None)
        for folder, free in short:
            told = f"a checkpoint of this run takes {size:,} bytes, and {folder} has {free:,} bytes free"
            if free < size:
                raise UserRuntimeError(
                    f"checkpoints cannot be saved: {told}. Legal: another folder (ModelCheckpoint(dirpath=..) or "
                    "Trainer(default_root_dir=..)), or Trainer(enable_checkpointing=False)"
                )
            rank_zero_warn(
                f"{told}: there is no room for two, and an old one is removed only when the new one is whole"
            )


def _bytes_written(tensors: Mapping[str, Any]) -> int:
    """By this rank."""
    return sum(
        sum(part.extent.numel for part in tensor.parts) * tensor.dtype.itemsize
        for tensor in _global_tensors(tensors)
        if tensor.writes
    )


def _global_tensors(tensors: Mapping[str, Any]) -> Iterator[GlobalTensor]:
    for value in tensors.values():
        if isinstance(value, GlobalTensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _global_tensors(value)


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
