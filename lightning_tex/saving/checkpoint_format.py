"""The seam between a run and the forms of a checkpoint: a class for each form, and a version inside each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from lightning_tex.optim import Stepped
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving.remote_path import Location
from lightning_tex.saving.writing import Broadcast, Save

# Our own entry beside Lightning's, in both forms.
OWN_ENTRY = "lightning_tex"


@dataclass(frozen=True)
class ShardedRun:
    """What is saved and loaded: one sharded model and its optimizers.

    Args:
        module: the sharded model.
        topology: the layout it is sharded for.
        optimizer: the sharded optimizer, or several as one; ``None`` when there is nothing to train.
        broadcast: sends rank 0's object to all ranks.
        checkpoint_io: Lightning's plugin, which writes and reads plain files.
    """

    module: nn.Module
    topology: Topology
    optimizer: Stepped | None
    broadcast: Broadcast
    checkpoint_io: CheckpointIO


# Reads what is the optimizers'; collective. Returns random streams to continue when the first batch is there, because
# fetching it draws a random number.
Finish = Callable[[ShardedRun], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Loaded:
    """What is left to do after a checkpoint was read.

    Args:
        trainer_state: what Lightning restores itself.
        finish: what follows once there are optimizers.
    """

    trainer_state: dict[str, Any]
    finish: Finish


class CheckpointFormat(ABC):
    """One form of a checkpoint. Whatever form and layout it was written in, a checkpoint loads on any layout."""

    writes_on_all_ranks: ClassVar[bool]

    @abstractmethod
    def check_io(self, checkpoint_io: CheckpointIO) -> None:
        """Raise ``MisconfigurationException`` if writing would pass the plugin over."""

    @abstractmethod
    def model_state(self, run: ShardedRun) -> dict[str, Any]:
        """What Lightning collects as ``state_dict``; collective."""

    @abstractmethod
    def optimizer_state(self, run: ShardedRun) -> dict[str, Any]:
        """What Lightning collects as one of ``optimizer_states``; collective."""

    @abstractmethod
    def begin(self, run: ShardedRun, checkpoint: Mapping[str, Any], filepath: Any, linked: bool) -> Save | None:
        """Save what Lightning collected; collective.

        Args:
            linked: as for :meth:`lightning_tex.saving.store.Store.install`.

        Returns:
            what is left to be written from copies, beside training; ``None``: the checkpoint is complete.

        Raises:
            MisconfigurationException: what cannot be saved so, or not there.
            RuntimeError: on all ranks, when rank 0 cannot write.
        """

    @abstractmethod
    def load(self, run: ShardedRun, filepath: str, weights_only: bool | None, strict: bool) -> Loaded:
        """Read a checkpoint of this form, but for what is the optimizers'; collective. :meth:`load_model` follows.

        Raises:
            ValueError: it is damaged, of a version that is not known, or does not fit the model or the optimizer.
        """

    @abstractmethod
    def load_model(self, run: ShardedRun, checkpoint: Mapping[str, Any], strict: bool) -> Finish:
        """Take the weights of a loaded ``trainer_state``, after ``on_load_checkpoint`` hooks may have changed it."""

    @abstractmethod
    def load_weights(self, run: ShardedRun, filepath: str, strict: bool) -> Finish:
        """Read the weights alone, of a whole state or of a file with nothing else; collective.

        Where 16-bit parameters have fp32 masters, what follows sets these too, as exactly as they were saved.

        Raises:
            ValueError: it is damaged, of a version that is not known, or does not fit the model.
        """

    @abstractmethod
    def for_one_process(self, path: Location, trusted: bool = False) -> Path | IO[bytes]:
        """What Lightning's ``load_from_checkpoint`` reads the weights and hyper-parameters from.

        Args:
            trusted: with objects of any type, as ``weights_only=False`` makes them.
        """
