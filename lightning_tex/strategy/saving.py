"""What Lightning asks of a strategy about saving: beside training, links, pruning."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import Optimizer

from lightning_tex.optim import Stepped, TiledOptimizer, as_one
from lightning_tex.parallel.errors import UserTypeError
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving import (
    Background,
    CheckpointFormat,
    DirectoryCheckpoint,
    Location,
    PlainCheckpoint,
    Search,
    ShardedRun,
    SideGroup,
    at,
    exactly,
    require_writable,
    store_of,
)
from lightning_tex.strategy.checkpoint_folders import model_checkpoints, saving_folders
from lightning_tex.strategy.mesh import MeshStrategy

_log = logging.getLogger(__name__)


_LIGHTNINGS_LINK = ModelCheckpoint._link_checkpoint


class _LinkWhenComplete:
    """In the place of ``ModelCheckpoint._link_checkpoint``; a copy of the callback has Lightning's again."""

    def __init__(self, link: Callable[[str, str], None]) -> None:
        self._link = link

    def __call__(self, trainer: Trainer, filepath: str, linkpath: str) -> None:
        self._link(filepath, linkpath)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (ModelCheckpoint, "_link_checkpoint")


def _exists(filepath: str | Path, trainer: Trainer) -> bool:
    """In the place of ``ModelCheckpoint.file_exists``: a name is taken as soon as its save has begun."""
    strategy = trainer.strategy
    begun = isinstance(strategy, SavingStrategy) and at(filepath).absolute() in strategy._saved_here
    return strategy.broadcast(begun or (trainer.is_global_zero and get_filesystem(filepath).exists(filepath)))


class SavingStrategy(MeshStrategy):
    """A strategy whose checkpoints are directories that every rank writes its part of, or single plain files.

    A directory is written by a thread while training goes on. Whatever must come after a save (a link to it, removing
    an older one) waits for it in the same queue, and is not done when it fails.

    Args:
        distributed: directories, not files.
        background: write directories beside training.
        process_group_backend, timeout, arguments, lightning_options: as for :class:`MeshStrategy`.
    """

    def __init__(
        self,
        distributed: bool,
        background: bool,
        process_group_backend: str | None,
        timeout: timedelta | None,
        arguments: Mapping[str, Any],
        **lightning_options: Any,
    ) -> None:
        super().__init__(process_group_backend, timeout, arguments, **lightning_options)
        self._writing_format: CheckpointFormat = DirectoryCheckpoint() if distributed else PlainCheckpoint()
        self._save_in_background = background
        self._background = Background()
        self._training = False
        self._side_group: SideGroup | None = None
        self._saved_here: set[Location] = set()

    def __getstate__(self) -> dict[str, Any]:
        optimizers: dict[str, Any] = {"_optimizers": [], "_lightning_optimizers": [], "lr_scheduler_configs": []}
        return {**super().__getstate__(), **optimizers, "_background": Background(), "_side_group": None}

    @property
    @abstractmethod
    def topology(self) -> Topology:
        """All axes of the run."""

    @property
    def saves_directories(self) -> bool:
        """Whether checkpoints are directories, not plain files."""
        return isinstance(self._writing_format, DirectoryCheckpoint)

    @property
    def tiled_optimizers(self) -> list[TiledOptimizer]:
        """The optimizers; none before a fit has set them up, and where ``configure_optimizers`` returned none."""
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, TiledOptimizer)]

    @property
    def tiled_optimizer(self) -> TiledOptimizer | None:
        """The first of them."""
        return next(iter(self.tiled_optimizers), None)

    @property
    def stepped(self) -> Stepped | None:
        """The optimizer, or several as one."""
        return as_one(self.tiled_optimizers)

    def _run(self) -> ShardedRun:
        assert self.model is not None
        return ShardedRun(self.model, self.topology, self.stepped, self.broadcast, self.checkpoint_io)

    def check_checkpoint_io(self) -> None:
        """Raise ``MisconfigurationException`` if the Trainer's ``CheckpointIO`` would not be used."""
        self._writing_format.check_io(self.checkpoint_io)

    def try_folders(self, trainer: Trainer) -> None:
        """Refuse folders in which the run's checkpoints could not be written; collective."""
        folders = list(map(at, saving_folders(trainer)))
        writes = self._writing_format.writes_on_all_ranks or self.is_global_zero
        require_writable(folders, writes, self.topology.world, self.broadcast)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights for a checkpoint: described globally, or whole on rank 0 and empty elsewhere; collective."""
        return self._writing_format.model_state(self._run())

    def described_weights(self, module: nn.Module) -> dict[str, Any]:
        """Of another module that is sharded as the model is, in the same forms; collective."""
        return self._writing_format.model_state(replace(self._run(), module=module, optimizer=None))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Optimizer states for a checkpoint, in the same two forms; collective."""
        if not isinstance(optimizer, TiledOptimizer):
            return {}
        return self._writing_format.optimizer_state(replace(self._run(), optimizer=optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; collective. In a fit, a directory is complete at the latest when the fit ends.

        Raises:
            RuntimeError: on all ranks, when one of them cannot write; of a save in the background, at the next
                training step, the next save or the end of the fit.
        """
        if storage_options is not None:
            raise UserTypeError(
                "TexMoEStrategy.save_checkpoint(storage_options=...) is not supported; use a CheckpointIO"
            )
        self._background.wait()  # one copy of the states at a time
        run = self._run()
        save = self._writing_format.begin(run, checkpoint, filepath, linked=self._is_written_again(filepath))
        self._saved_here.add(at(filepath).absolute())
        if save is None:
            return
        if self._side_group is None:
            self._side_group = SideGroup(run.topology.world, self.group_timeout)
        group = self._side_group
        self._after_saves(lambda: save.finish(group))

    def step_boundary(self) -> None:
        """Between two batches of a fit; collective."""

    def save_complete(self, trainer: Trainer, path: Location) -> None:
        """Write the whole state, and return when it is on disk and read back; collective."""
        in_fit, self._training = self._training, False
        try:
            trainer.save_checkpoint(str(path), weights_only=False)
        finally:
            self._training = in_fit

    def _is_written_again(self, filepath: Any) -> bool:
        stem = PurePath(at(filepath).name).stem
        callbacks = model_checkpoints(self._trainer) if self._trainer is not None else []
        names = [callback.CHECKPOINT_NAME_LAST for callback in callbacks if callback.save_last]
        return any(stem == name or stem.startswith(f"{name}-v") for name in names)

    @property
    def _trainer(self) -> Trainer | None:
        return self.lightning_module._trainer if self.lightning_module is not None else None

    def _after_saves(self, job: Callable[[], None]) -> None:
        """Do it after all saves so far: in the background of a fit, else now."""
        if self._save_in_background and self._training:
            self._background.submit(job)
        else:
            self._background.wait()
            job()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, but not before those that were saved after it are on disk and read back."""
        path = at(filepath)
        self._saved_here.discard(path.absolute())
        if self.is_global_zero:
            ours = isinstance(path, Path) or type(self.checkpoint_io) is TorchCheckpointIO
            plugin = self.checkpoint_io
            self._after_saves(lambda: store_of(path).remove(path) if ours else plugin.remove_checkpoint(filepath))

    @property
    def saved_here(self) -> frozenset[Location]:
        """What this Trainer has saved and not removed, links resolved."""
        return frozenset(path.resolve() for path in self._saved_here)

    def newest_saved_here(self) -> Location | None:
        """The whole state that this Trainer would go on from; ``None``: it has saved none."""
        return next((state.path for state in Search(list(map(exactly, self._saved_here)))), None)

    def attend_callbacks(self, trainer: Trainer) -> None:
        """Let ``ModelCheckpoint`` know of saves that are under way.

        With ``save_last="link"`` its link is swapped by one rename, once what it leads to is complete.
        """
        for callback in model_checkpoints(trainer):
            if type(callback).file_exists is ModelCheckpoint.file_exists:
                callback.file_exists = _exists  # type: ignore[method-assign]
            if getattr(type(callback), "_link_checkpoint", None) is _LIGHTNINGS_LINK:
                callback._link_checkpoint = _LinkWhenComplete(self.link_checkpoint)  # type: ignore[method-assign]

    def link_checkpoint(self, filepath: str, linkpath: str) -> None:
        """Lead a link to a checkpoint, once that is complete."""
        target, link = at(filepath).absolute(), at(linkpath).absolute()
        if self.is_global_zero and target != link:
            self._after_saves(lambda: store_of(link).link(target, link))

    # --- the end of a save in the background

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._background.check()
        return super().training_step(*args, **kwargs)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._training = True

    def on_train_end(self) -> None:
        super().on_train_end()
        self._training = False
        self._background.wait()

    def teardown(self) -> None:
        self._training = False
        failure = self._background.close()
        if failure is not None:  # something else has ended the fit
            _log.error("%s", failure)
        super().teardown()

    def finish_saves(self) -> None:
        """Wait for the saves that are under way.

        Raises:
            RuntimeError: one of them failed.
        """
        self._background.wait()
