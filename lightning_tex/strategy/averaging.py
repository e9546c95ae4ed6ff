"""Averages of weights that Lightning's callbacks keep: copies of the model, which are sharded as the model is.

``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` copy the module before it is sharded and
compute element by element, which holds for a rank's part as for the whole. What is left to do: shard the copies, save
them as the model is saved, and take a rank's part of what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tex.parallel import initialization
from lightning_tex.parallel.sharding import parameter_shardings, shard_module, synchronise
from lightning_tex.parallel.topology import Topology

# What a copy is saved as: by name, described globally, or whole on rank 0 and empty elsewhere; collective.
Described = Callable[[nn.Module], dict[str, Any]]


class AveragedWeights:
    """The averages of a run: sharded once the model is, saved and loaded in the run's form until it is torn down.

    Args:
        described: what a checkpoint is to have of a sharded module.
    """

    def __init__(self, described: Described) -> None:
        self._described = described
        self._hooks: list[Any] = []

    @staticmethod
    def require_legal(trainer: Trainer, precision: str) -> None:
        """Refuse an average that would lose what it is for.

        Raises:
            MisconfigurationException: naming callback and precision.
        """
        for callback in _averaging(trainer):
            if precision.endswith("-mixed"):
                raise MisconfigurationException(
                    f"callback {type(callback).__name__} is not supported with precision={precision!r} by "
                    "TexMoEStrategy, whose parameters are of 16 bits then: validation would round the average to "
                    "them; legal: precision='32-true', '64-true' or 'bf16-true'"
                )

    def attend(self, trainer: Trainer, module: nn.Module, topology: Topology, device: torch.device, seed: int) -> None:
        """Shard the copies that callbacks have made of a module, after that; collective.

        Args:
            trainer: whose callbacks they are.
            module: the sharded model.
            topology: the layout it is sharded for.
            device: where it lies.
            seed: that weights on the meta device are drawn from.
        """
        self.leave()
        copies = list(_copies(trainer))
        for copied in copies:
            synchronise(copied, topology.world, device)
            shard_module(copied, topology)
            initialization.materialise(copied, device, seed)
            self._hooks.append(copied.register_state_dict_post_hook(_SavedAs(self._described)))
        for part in [module, *copies] if copies else []:
            self._hooks.append(part.register_load_state_dict_pre_hook(_OwnPart(topology)))

    @property
    def are_kept(self) -> bool:
        """Whether there are any."""
        return bool(self._hooks)

    def leave(self) -> None:
        """Let go of model and copies."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _Unique:
    """Stays what it is where a module that holds it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _SavedAs(_Unique):
    """A hook by which ``state_dict`` gives what a checkpoint is to have."""

    def __init__(self, described: Described) -> None:
        self._described, self._inside = described, False

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if self._inside:
            return
        self._inside = True
        try:
            described = self._described(module)
        finally:
            self._inside = False
        for name in [name for name in state_dict if name.startswith(prefix)]:
            del state_dict[name]
        state_dict.update({f"{prefix}{name}": value for name, value in described.items()})


class _OwnPart(_Unique):
    """A hook by which ``load_state_dict`` takes whole tensors and a rank's own parts alike."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        parameters = dict(module.named_parameters())
        for first, sharding in parameter_shardings(module, self._topology).items():
            for name in names[id(parameters[first])]:
                value = state_dict.get(f"{prefix}{name}")
                box = sharding.box
                if isinstance(value, Tensor) and tuple(value.shape) == box.full and box.stored != box.full:
                    state_dict[f"{prefix}{name}"] = box.shard(value)


def _averaging(trainer: Trainer) -> Iterator[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return (c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging)))


def _copies(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in _averaging(trainer):
        average = callback._average_model
        if average is not None:
            yield average.module if isinstance(callback, WeightAveraging) else average
