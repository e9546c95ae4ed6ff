"""A checkpoint as a directory: each rank writes its part, tensors described globally.

The version is the manifest's ``format`` (:data:`lightning_tex.saving.manifest.FORMAT`), on which all the files depend,
our entry of ``meta.pt`` too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import model_state, optimizer_state
from lightning_tex.saving.checkpoint_format import OWN_ENTRY, CheckpointFormat, Finish, Loaded, ShardedRun
from lightning_tex.saving.consolidate import consolidated
from lightning_tex.saving.further_weights import FURTHER, put_back, taken_out
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.optimizer_loading import (
    OptimizerStates,
    UnderRoot,
    load_masters,
    load_optimizer,
    masters_from,
)
from lightning_tex.saving.random_streams import RANDOM, random_rows, random_streams, restore_random_streams
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.remote_path import Location, at
from lightning_tex.saving.writing import Save, begin


class DirectoryCheckpoint(CheckpointFormat):
    """Every rank writes its part; written beside training, verified before anything is loaded."""

    writes_on_all_ranks = True

    def check_io(self, checkpoint_io: CheckpointIO) -> None:
        if type(checkpoint_io) is not TorchCheckpointIO:
            raise MisconfigurationException(
                f"{type(checkpoint_io).__name__} writes single files, so it would not be used: a checkpoint directory "
                "is written by all ranks; legal: no checkpoint_io, or "
                "TexMoEStrategy(save_distributed_checkpoint=False)"
            )

    def model_state(self, run: ShardedRun) -> dict[str, Any]:
        """Tensors described globally, by name."""
        return model_state.checkpointed(run.module, model_state.model_state(run.module, run.topology))

    def optimizer_state(self, run: ShardedRun) -> dict[str, Any]:
        """Tensors described globally, by parameter and key."""
        assert run.optimizer is not None
        return {"state": optimizer_state.optimizer_state(run.optimizer)}

    def begin(self, run: ShardedRun, checkpoint: Mapping[str, Any], filepath: Any, linked: bool) -> Save:
        self.check_io(run.checkpoint_io)
        trainer_state = dict(checkpoint)
        tensors: dict[str, Any] = {model_state.MODEL: _described(trainer_state.pop("state_dict"), run.topology.world)}
        own: dict[str, Any] = {"layout": asdict(run.topology.layout), model_state.TIES: model_state.ties(run.module)}
        states = trainer_state.pop("optimizer_states", None)
        if states and run.optimizer is not None:
            for root, one in zip(optimizer_state.roots(run.optimizer), states, strict=True):
                tensors.setdefault(root, {"state": {}})["state"].update(one["state"])
            own["optimizer"] = optimizer_state.optimizer_entry(run.optimizer)
            tensors[RANDOM] = random_rows(random_streams(), run.topology.world)
        tensors[FURTHER], places = taken_out(trainer_state)
        trainer_state[OWN_ENTRY] = own | places
        path = at(run.broadcast(str(filepath)))
        return begin(path, linked, tensors, trainer_state, run.topology.layout, run.topology.world, run.broadcast)

    def load(self, run: ShardedRun, filepath: str, weights_only: bool | None, strict: bool) -> Loaded:
        source = Directory.verified(at(filepath), run.topology.world)
        trainer_state = source.trainer_state(weights_only)
        own = trainer_state.pop(OWN_ENTRY)
        about = own.get("optimizer")  # a save of the weights alone has none
        _load_weights(run, source, strict)
        put_back(run, trainer_state, source, own)

        def finish(run: ShardedRun) -> Mapping[str, Tensor]:
            if run.optimizer is None:
                return {}
            if about is not None:
                under = partial(UnderRoot, source)
                for optimizer, states in OptimizerStates.of_each(about, run.optimizer, under):
                    load_optimizer(optimizer, states)
            load_masters(run.optimizer, source)
            if own["layout"] != asdict(run.topology.layout):
                return {}
            streams = _read_random(source, run.topology.world)
            if _within_epoch(trainer_state):
                return streams
            restore_random_streams(streams)
            return {}

        return Loaded(trainer_state, finish)

    def load_model(self, run: ShardedRun, checkpoint: Mapping[str, Any], strict: bool) -> Finish:
        """Nothing: :meth:`load` has put the weights in their place."""
        return lambda _: {}

    def load_weights(self, run: ShardedRun, filepath: str, strict: bool) -> Finish:
        source = Directory.verified(at(filepath), run.topology.world)
        _load_weights(run, source, strict)
        return masters_from(source)

    def for_one_process(self, path: Location, trusted: bool = False) -> Path | IO[bytes]:
        buffer = io.BytesIO()
        torch.save(consolidated(path, weights_only=True, trusted=trusted), buffer)
        buffer.seek(0)
        return buffer


def _described(weights: Mapping[str, Any], world: Axis) -> dict[str, Any]:
    """Weights as they are written; in one process those, too, that a hook has put in the place of ours."""
    replaced = {name: value for name, value in weights.items() if not isinstance(value, GlobalTensor)}
    if world.size == 1 and all(isinstance(value, Tensor) for value in replaced.values()):
        return {**weights, **{name: GlobalTensor.whole(value.detach()) for name, value in replaced.items()}}
    if replaced:
        raise MisconfigurationException(
            f"a hook replaced entries of checkpoint['state_dict'] by other tensors ({', '.join(list(replaced)[:4])}); "
            "they would be this rank's part only. Use TexMoEStrategy(save_distributed_checkpoint=False)"
        )
    return dict(weights)


def _load_weights(run: ShardedRun, source: Directory, strict: bool) -> None:
    """Into the parts that there are; a ``load_state_dict`` of the module's own is called where these are whole."""
    if run.topology.world.size == 1 and model_state.loads_itself(run.module):
        whole = source.whole(lambda name: name[0] == model_state.MODEL)
        run.module.load_state_dict({path[1]: value for path, value in whole}, strict=strict)
    else:
        model_state.load_checkpointed(run.module, run.topology, source, strict)


def _read_random(source: Directory, world: Axis) -> dict[str, Tensor]:
    streams = {
        path[1]: torch.empty(saved.shape[1], dtype=saved.dtype)
        for path, saved in source.saved.items()
        if path[0] == RANDOM
    }
    rows = random_rows(streams, world)
    source.fill({(RANDOM, name): row for name, row in rows.items()})
    return streams


def _within_epoch(trainer_state: Mapping[str, Any]) -> bool:
    """Whether a run that was not interrupted would take its next step without a new iterator of its data."""
    loops = trainer_state.get("loops", {}).get("fit_loop", {})
    training, validation = (loops.get(f"epoch_loop.{loop}batch_progress") for loop in ("", "val_loop."))
    if validation and validation["current"]["ready"] > validation["current"]["processed"]:
        return True
    return bool(training and training["current"]["ready"] and not training["is_last_batch"])
