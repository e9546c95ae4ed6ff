"""What the strategy's checkpoint methods do, for both forms of a checkpoint.

Directory: each rank writes its part, tensors described globally, so that any layout reads them.
Plain file: Lightning's own format, gathered on rank 0. Both are read on any layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tex.optim import TiledOptimizer
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving import optimizer_state, places, plain, state
from lightning_tex.saving.random_streams import RANDOM, random_rows, random_streams, restore_random_streams
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.rest import plain_data, restricted_load
from lightning_tex.saving.sharded import GlobalTensor
from lightning_tex.saving.writing import Broadcast, Save, begin, on_first_rank

# Our own entry beside Lightning's.
OWN = "lightning_tex"
# In it: further names of tied parameters.
TIES = "ties"


def _within_epoch(rest: Mapping[str, Any]) -> bool:
    """Whether a run that was not interrupted would take its next step without a new iterator of its data."""
    progress = rest.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    return bool(progress and progress["current"]["ready"] and not progress["is_last_batch"])


class Checkpoints:
    """Saves and loads one sharded model and its optimizer.

    Args:
        module: the sharded model.
        topology: the layout it is sharded for.
        optimizer: the sharded optimizer; ``None`` when there is nothing to train.
        distributed: whether to save a directory or one plain file.
        broadcast: sends rank 0's object to all ranks.
        io: Lightning's plugin, which writes and reads plain files.
    """

    def __init__(
        self,
        module: nn.Module,
        topology: Topology,
        optimizer: TiledOptimizer | None,
        distributed: bool,
        broadcast: Broadcast,
        io: CheckpointIO,
    ) -> None:
        self.module, self.topology, self.optimizer = module, topology, optimizer
        self.distributed, self.broadcast, self.io = distributed, broadcast, io
        # What load leaves to be restored when the first batch is there, because fetching it draws a random number.
        self.random_at_first_step: dict[str, Tensor] = {}

    # --- saving

    def model_state(self) -> dict[str, Any]:
        """The checkpoint's ``state_dict``: described globally, or whole on rank 0; collective."""
        if self.distributed:
            return dict(state.model_state(self.module, self.topology))
        return dict(plain.whole_model_state(self.module, self.topology, self.optimizer))

    def optimizer_state(self) -> dict[str, Any]:
        """One entry of the checkpoint's ``optimizer_states``: described globally, or whole on rank 0; collective."""
        assert self.optimizer is not None
        if not self.distributed:
            return plain.whole_optimizer_state(self.optimizer, self.topology)
        return {
            "state": optimizer_state.optimizer_state(self.optimizer),
            "param_groups": optimizer_state.group_options(self.optimizer),
            "numbers": optimizer_state.number_keys(self.optimizer),
            "dice": asdict(self.optimizer.rounding_seed),
        }

    def begin(self, checkpoint: dict[str, Any], filepath: Any, linked: bool) -> Save:
        """Copy what Lightning collected, to be written to a directory; collective.

        Raises:
            MisconfigurationException: with a plugin that only writes files, or not on a mounted file system.
            RuntimeError: on all ranks, when rank 0 cannot make the directory.
        """
        if type(self.io) is not TorchCheckpointIO:
            raise MisconfigurationException(
                f"{type(self.io).__name__} writes single files, so it would be ignored: use it with "
                "TexMoEStrategy(save_distributed_checkpoint=False)"
            )
        if not _is_local_file_protocol(str(filepath)):
            raise MisconfigurationException(
                f"{filepath} is not on a mounted file system, where a checkpoint directory must be; "
                "TexMoEStrategy(save_distributed_checkpoint=False) writes one file, to remote places too"
            )
        checkpoint = dict(checkpoint)
        tensors: dict[str, Any] = {state.MODEL: self._described(checkpoint.pop("state_dict"))}
        own: dict[str, Any] = {"layout": asdict(self.topology.layout), TIES: state.ties(self.module)}
        optimizers = checkpoint.pop("optimizer_states", [])
        if optimizers and "numbers" in optimizers[0]:
            tensors[state.OPTIMIZER] = {"state": optimizers[0]["state"]}
            own["optimizer"] = {key: value for key, value in optimizers[0].items() if key != "state"}
            tensors[RANDOM] = random_rows(random_streams(), self.topology.world)
        rest = {**checkpoint, OWN: own}
        path = Path(self.broadcast(str(filepath)))
        return begin(path, linked, tensors, rest, self.topology.layout, self.topology.world, self.broadcast)

    def save_plain(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        """Write what Lightning collected to one file, from rank 0; collective.

        Raises:
            RuntimeError: on all ranks, when rank 0 cannot write.
        """
        on_first_rank(lambda: self._write_plain(checkpoint, filepath), self.topology.world, self.broadcast)

    def _write_plain(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        if type(self.io) is not TorchCheckpointIO or not _is_local_file_protocol(str(filepath)):
            self.io.save_checkpoint(plain_data(checkpoint), filepath)
            return
        path = Path(filepath)
        places.require_replaceable(path)
        partial = places.partial_name(path)
        try:
            self.io.save_checkpoint(plain_data(checkpoint), partial)
            places.replace_by_file(partial, path)
        finally:
            places.remove(partial)

    def _described(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        replaced = [name for name, value in weights.items() if not isinstance(value, GlobalTensor)]
        if replaced:
            raise MisconfigurationException(
                f"a hook replaced entries of checkpoint['state_dict'] by other tensors ({', '.join(replaced[:4])}); "
                "they would be this rank's part only. Use TexMoEStrategy(save_distributed_checkpoint=False)"
            )
        return dict(weights)

    # --- loading

    def load(self, filepath: Any, weights_only: bool | None, strict: bool) -> dict[str, Any]:
        """Read a checkpoint of either form, written on any layout; collective.

        From a directory everything is read here. From a plain file the optimizer states are; its weights follow in
        :meth:`load_whole_model`, so that ``on_load_checkpoint`` hooks may change them before.

        Returns:
            what Lightning restores itself.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it does not fit the model or the optimizer.
        """
        path = Path(self.broadcast(str(filepath)))
        local = _is_local_file_protocol(str(path))
        path = places.find(path) if local and type(self.io) is TorchCheckpointIO else path
        if path.is_dir():
            return self._load_directory(path, weights_only, strict)
        if type(self.io) is TorchCheckpointIO and path.is_file():
            # Mapped, not read: each rank touches only its boxes.
            checkpoint = restricted_load(path, path, weights_only, mmap=True)
        else:
            checkpoint = self.io.load_checkpoint(filepath, weights_only=weights_only)
        if self.optimizer is not None and checkpoint.get("optimizer_states"):
            self._load_whole_optimizer(checkpoint)
        return checkpoint

    def _load_directory(self, path: Path, weights_only: bool | None, strict: bool) -> dict[str, Any]:
        source = Directory.verified(path, self.topology.world)
        rest = source.rest(weights_only)
        own = rest.get(OWN, {})
        saved = own.get("optimizer")
        if self.optimizer is not None and saved is not None:
            optimizer_state.require_same_groups(saved["param_groups"], self.optimizer)
        state.load_model(self.module, self.topology, source, strict)
        if self.optimizer is None:
            return rest
        if saved is not None:
            optimizer_state.load_optimizer(self.optimizer, source, saved["param_groups"], saved["numbers"])
            self.optimizer.rounding_seed.restore(saved.get("dice"))
        optimizer_state.load_masters(self.optimizer, source)
        if own.get("layout") == asdict(self.topology.layout):
            streams = self._read_random(source)
            if _within_epoch(rest):
                self.random_at_first_step = streams
            else:
                restore_random_streams(streams)
        return rest

    def _read_random(self, source: Directory) -> dict[str, Tensor]:
        streams = {
            path[1]: torch.empty(saved.shape[1], dtype=saved.dtype)
            for path, saved in source.saved.items()
            if path[0] == RANDOM
        }
        rows = random_rows(streams, self.topology.world)
        source.fill({(RANDOM, name): row for name, row in rows.items()})
        return streams

    def _load_whole_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        saved = checkpoint["optimizer_states"][0]
        if "param_groups" in saved:
            states, groups, numbers = plain.states_by_name(saved, self.optimizer)
            rounding_seed = saved.get("dice")
        else:  # a consolidated directory: by name already
            own = checkpoint[OWN]["optimizer"]
            states, groups, numbers = saved["state"], own["param_groups"], own["numbers"]
            rounding_seed = own.get("dice")
        optimizer_state.load_optimizer(self.optimizer, plain.PlainFile.of_optimizer(states), groups, numbers)
        self.optimizer.rounding_seed.restore(rounding_seed)

    def load_whole_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Cut the whole weights of a plain file; nothing if they came from a directory."""
        if "state_dict" not in checkpoint:
            return
        weights = plain.PlainFile.of_model(checkpoint["state_dict"])
        state.load_model(self.module, self.topology, weights, strict)
        if self.optimizer is not None:
            optimizer_state.load_masters(self.optimizer, weights)
