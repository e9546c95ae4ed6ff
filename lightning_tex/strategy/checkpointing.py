"""What Lightning asks of a strategy about checkpoints beside saving: loading and resuming."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_tex.saving import (
    CheckpointFormat,
    PlainCheckpoint,
    ShardedRun,
    at,
    located,
    reading_format,
)
from lightning_tex.saving.checkpoint_format import Finish
from lightning_tex.saving.random_streams import restore_random_streams
from lightning_tex.saving.trainer_state import restricted_load
from lightning_tex.strategy import agreement
from lightning_tex.strategy.checkpoint_folders import take_file_urls_for_paths
from lightning_tex.strategy.ckpt_path import CheckpointConnector
from lightning_tex.strategy.initial_weights import InitialWeights
from lightning_tex.strategy.saving import SavingStrategy


class CheckpointingStrategy(SavingStrategy):
    """A strategy that reads what it writes, of any layout and form, and what others wrote.

    Args:
        init_from: a checkpoint whose weights a fit begins with that resumes from nothing.
        options: as for :class:`SavingStrategy`.
    """

    def __init__(self, init_from: str | os.PathLike[str] | None, **options: Any) -> None:
        super().__init__(**options)
        self._reading_format: CheckpointFormat = PlainCheckpoint()
        self._random_at_first_step: dict[str, Tensor] = {}
        self._unfinished: list[Finish] | None = None  # of the restoring that is under way
        self._init_from = init_from
        self.initial_weights = InitialWeights()

    @contextmanager
    def run_frame(self, trainer: Trainer) -> Iterator[None]:
        CheckpointConnector.take_over(trainer, self)
        take_file_urls_for_paths(trainer)
        with super().run_frame(trainer):
            yield

    @property
    def lightning_restore_optimizer(self) -> bool:
        """:meth:`finish_loading` does."""
        return False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.continue_random_streams()
        return super().training_step(*args, **kwargs)

    def continue_random_streams(self) -> None:
        """In the first step after a checkpoint was read, and its batch is there: continue its random streams."""
        restore_random_streams(self._random_at_first_step)
        self._random_at_first_step = {}

    def draw_as(self, streams: dict[str, Tensor]) -> None:
        """Continue from these random states in the next step."""
        self._random_at_first_step = streams

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of either form, from any layout, into the sharded model and the sharded optimizer.

        Before there is a model: as one process reads it, whole, into nothing.
        """
        if self.lightning_module is None:
            path = located(str(checkpoint_path), self.checkpoint_io)
            whole = reading_format(path).for_one_process(at(path), trusted=weights_only is False)
            return restricted_load(whole, path, weights_only)
        self._background.wait()
        run = self._run()
        self._begin_to_load(run)
        path = located(self.broadcast(str(checkpoint_path)), run.checkpoint_io)
        self._reading_format = reading_format(path)
        loaded = self._reading_format.load(run, path, weights_only, self.lightning_module.strict_loading)
        self._random_at_first_step = {}
        self._once_there_are_optimizers(loaded.finish)
        return loaded.trainer_state

    def restore(self, trainer: Trainer) -> None:
        """Within ``setup``, once the model is sharded and before it has optimizers: what Lightning asked for before.

        So weights are read into the parts that there are now, and hooks see what they do under other strategies:
        weights in ``configure_optimizers``, the state of callbacks in ``on_fit_start``.
        """
        connector = trainer._checkpoint_connector
        assert isinstance(connector, CheckpointConnector)
        self._unfinished = []
        connector.restore_what_was_put_off()

    def finish_loading(self) -> None:
        """After ``on_fit_start``: read what is the optimizers'; collective."""
        unfinished, self._unfinished = self._unfinished, None
        for finish in unfinished or ():
            self._once_there_are_optimizers(finish)

    def _once_there_are_optimizers(self, finish: Finish) -> None:
        if self._unfinished is not None:
            self._unfinished.append(finish)
        else:
            self._random_at_first_step = {**self._random_at_first_step, **finish(self._run())}

    def _begin_to_load(self, run: ShardedRun) -> None:
        assert self.lightning_module is not None
        if not self.lightning_module.strict_loading:  # a checkpoint that may lack weights, such as of adapters alone
            self._once_there_are_optimizers(self.initial_weights.take(run))
        self.initial_weights.forget()

    def load_states(self, path: str) -> None:
        """Within a fit: take weights, buffers and optimizer states from a checkpoint, and nothing else; collective.

        Options of the optimizer's groups, such as learning rates, random numbers and loops stay.
        """
        optimizer = self.stepped
        groups = [] if optimizer is None else optimizer.param_groups
        options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        trainer_state = self.load_checkpoint(path)
        self._random_at_first_step = {}
        self.load_model_state_dict(trainer_state)
        for group, kept in zip(groups, options, strict=True):
            group.update(kept)
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(trainer_state)

    def agree_to_resume(self, ckpt_path: str | None) -> None:
        """Refuse, on all ranks, that they resume from different things; collective."""
        self._require_agreement(agreement.resuming(ckpt_path))

    def begin_from_weights(self) -> None:
        """Where nothing was loaded: take ``init_from``'s weights, or those the module is to begin with; collective.

        ``init_from``, of either form and any layout, is for the beginning of a fit.
        """
        trainer = self._trainer
        fitting = trainer is None or trainer.state.fn == TrainerFn.FITTING
        if self._init_from is None or not fitting or (trainer is not None and trainer.global_step):
            self._once_there_are_optimizers(self.initial_weights.take(self._run()))
            return
        assert self.lightning_module is not None
        run = self._run()
        self._begin_to_load(run)
        path = located(self.broadcast(str(self._init_from)), run.checkpoint_io)
        strict = self.lightning_module.strict_loading
        self._once_there_are_optimizers(reading_format(path).load_weights(run, path, strict))
        rank_zero_info(f"A new run begins with the weights of {path}")

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Shard the weights of a plain file; those of a directory are in place already."""
        self._once_there_are_optimizers(self._reading_format.load_model(self._run(), checkpoint, strict))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: :meth:`finish_loading` has done it."""
