"""A checkpoint as one plain file, as Lightning's own strategies write it; its version: :mod:`.plain_form`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from torch import Tensor

from lightning_tex.optim import TiledOptimizer
from lightning_tex.optim.stand_in import WholeStates
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving import gathering, paths, plain_form
from lightning_tex.saving.archive import with_room
from lightning_tex.saving.checkpoint_format import OWN_ENTRY, CheckpointFormat, Finish, Loaded, ShardedRun
from lightning_tex.saving.model_state import load_checkpointed, loads_itself
from lightning_tex.saving.optimizer_loading import load_optimizer, masters_from
from lightning_tex.saving.remote_path import Location, RemotePath, at
from lightning_tex.saving.stores import store_of
from lightning_tex.saving.trainer_state import load_file, plain_data
from lightning_tex.saving.whole_tensors import WholeTensors, tensor_bytes
from lightning_tex.saving.writing import on_first_rank


class PlainCheckpoint(CheckpointFormat):
    """Whole tensors, gathered and written on rank 0, by the user's plugin if there is one."""

    writes_on_all_ranks = False

    def check_io(self, checkpoint_io: CheckpointIO) -> None:
        """Nothing: any plugin writes plain files."""

    def model_state(self, run: ShardedRun) -> dict[str, Any]:
        """Whole tensors on rank 0, empty elsewhere."""
        return dict(gathering.whole_model_state(run.module, run.topology, run.optimizer))

    def optimizer_state(self, run: ShardedRun) -> dict[str, Any]:
        """Whole tensors in torch's own form on rank 0, empty elsewhere."""
        assert run.optimizer is not None
        return gathering.whole_optimizer_state(run.optimizer, run.topology)

    def begin(self, run: ShardedRun, checkpoint: Mapping[str, Any], filepath: Any, linked: bool) -> None:
        has_states = run.optimizer is not None and "optimizer_states" in checkpoint
        rounding_seed = asdict(run.optimizer.rounding_seed) if run.optimizer is not None and has_states else None
        content = plain_form.versioned(checkpoint, rounding_seed)
        on_first_rank(lambda: _write(run.checkpoint_io, content, filepath), run.topology.world, run.broadcast)

    def load(self, run: ShardedRun, filepath: str, weights_only: bool | None, strict: bool) -> Loaded:
        """Read the file; the weights follow in :meth:`load_model`."""
        checkpoint = _read(run.checkpoint_io, filepath, weights_only)

        def finish(run: ShardedRun) -> Mapping[str, Tensor]:
            if run.optimizer is not None and checkpoint.get("optimizer_states"):
                for optimizer, states in plain_form.optimizer_states(checkpoint, run.optimizer):
                    load_optimizer(optimizer, states)
            return {}

        return Loaded({key: value for key, value in checkpoint.items() if key != OWN_ENTRY}, finish)

    def load_model(self, run: ShardedRun, checkpoint: Mapping[str, Any], strict: bool) -> Finish:
        """Shard the whole weights. A ``load_state_dict`` of the module's own is called where it holds whole ones."""
        weights = WholeTensors.of_model(checkpoint["state_dict"])
        if run.topology.world.size == 1 and loads_itself(run.module):
            run.module.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            load_checkpointed(run.module, run.topology, weights, strict)
        return masters_from(weights)

    def load_weights(self, run: ShardedRun, filepath: str, strict: bool) -> Finish:
        checkpoint = _read(run.checkpoint_io, filepath, weights_only=None)
        if "state_dict" not in checkpoint:
            raise UserValueError(
                f"{filepath} has no 'state_dict', so no weights are found in it; legal: a checkpoint of a Trainer, or "
                "torch.save({'state_dict': module.state_dict()}, PATH)"
            )
        return self.load_model(run, checkpoint, strict)

    def for_one_process(self, path: Location, trusted: bool = False) -> Path | IO[bytes]:
        return io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path


def states_in_torch_form(optimizer: TiledOptimizer, topology: Topology) -> WholeStates:
    """What ``optimizer.state_dict`` and ``load_state_dict`` do in a run of one process."""

    def put(states: dict[str, Any]) -> None:
        load_optimizer(optimizer, plain_form.by_number(states, None, optimizer))

    return WholeStates(lambda: gathering.whole_optimizer_state(optimizer, topology), put)


def _read(checkpoint_io: CheckpointIO, filepath: str, weights_only: bool | None) -> dict[str, Any]:
    checkpoint: dict[str, Any]
    path = at(filepath)
    if type(checkpoint_io) is TorchCheckpointIO and (isinstance(path, RemotePath) or path.is_file()):
        checkpoint = load_file(path, weights_only)
    else:
        checkpoint = checkpoint_io.load_checkpoint(filepath, weights_only=weights_only)
    plain_form.version_of(checkpoint)
    return checkpoint


def _write(checkpoint_io: CheckpointIO, checkpoint: dict[str, Any], filepath: Any) -> None:
    if type(checkpoint_io) is not TorchCheckpointIO:
        checkpoint_io.save_checkpoint(plain_data(checkpoint), filepath)
        return
    path = at(filepath)
    paths.require_replaceable(path)
    try:
        with store_of(path).single_file(path) as place:
            checkpoint_io.save_checkpoint(plain_data(checkpoint), place)
    except OSError as error:
        raise with_room(error, path, tensor_bytes(checkpoint)) from None
