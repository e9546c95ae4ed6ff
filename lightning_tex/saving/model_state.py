"""Weights of a sharded model, described globally, to be written from or read into in place.

Saved tensors are named by paths: ``("model", name)`` and ``("optimizer_0", "state", parameter name, key)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_tex.parallel.errors import UserTypeError, UserValueError
from lightning_tex.parallel.sharding import ParameterSharding, parameter_shardings
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving.global_tensor import GlobalTensor, stored_part

TensorPath = tuple[str, ...]
_Entry = TypeVar("_Entry")

MODEL = "model"
OPTIMIZERS = "optimizer_{}"
OPTIMIZER = OPTIMIZERS.format(0)
# In our entry of a directory: further names of tied parameters.
TIES = "ties"


class Described(Protocol):
    """What is known of a tensor before it is read: of a saved one, and of one to read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""


class Source(Protocol):
    """A checkpoint to read tensors from."""

    @property
    def saved(self) -> Mapping[TensorPath, Described]:
        """What there is."""

    def fill(self, request: Mapping[TensorPath, GlobalTensor]) -> None:
        """Read the parts of each requested tensor into their place. Called on all ranks, with different requests."""


def require_same_shape(path: TensorPath, saved: Described, wanted: Described) -> None:
    """Raise ``ValueError`` if a saved tensor has another shape than the one to be read."""
    if tuple(saved.shape) != tuple(wanted.shape):
        raise UserValueError(
            f"{'.'.join(path)} has shape {list(saved.shape)} in the checkpoint, not {list(wanted.shape)}"
        )


def shardings_by_identity(module: nn.Module, topology: Topology) -> dict[int, ParameterSharding]:
    """Shardings by the identity of the parameter."""
    parameters = dict(module.named_parameters())
    return {id(parameters[name]): sharding for name, sharding in parameter_shardings(module, topology).items()}


def model_state(module: nn.Module, topology: Topology) -> dict[str, GlobalTensor]:
    """Every entry of ``module.state_dict()``, tied parameters under all their names.

    One rank writes each part; which of the replicas it is differs from parameter to parameter.
    """
    return {
        name: _global(value.detach(), position, known.get(id(value)), topology)
        for known in [shardings_by_identity(module, topology)]
        for position, (name, value) in enumerate(state_dict_tensors(module).items())
    }


def state_dict_tensors(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with the parameters themselves.

    Raises:
        TypeError: an entry that is not a tensor, by name.
    """
    state = module.state_dict(keep_vars=True)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserTypeError(f"the state_dict has entries that are not tensors, which cannot be saved: {', '.join(odd)}")
    return state


def checkpointed(module: nn.Module, state: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Of a state the entries that checkpoints hold: all, or those that the module's ``checkpointed_names()`` tells.

    A module that leaves weights out gives them again by ``initial_weights()``, and has ``strict_loading=False``.
    """
    tell = getattr(module, "checkpointed_names", None)
    names: Collection[str] | None = None if tell is None else tell()
    return {name: value for name, value in state.items() if names is None or name in names}


def ties(module: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, each with the name its optimizer states are saved under."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    saved = checkpointed(module, state_dict_tensors(module))
    names = {name: first.get(id(value), name) for name, value in saved.items()}
    return {name: parameter for name, parameter in names.items() if name != parameter}


def _global(value: Tensor, position: int, sharding: ParameterSharding | None, topology: Topology) -> GlobalTensor:
    if sharding is None:
        return GlobalTensor.whole(value, writes=topology.world.rank == 0)
    writes = sharding.counted and sharding.replicas.rank == position % sharding.replicas.size
    return GlobalTensor(sharding.box.full, value.dtype, [stored_part(sharding.box, value)], writes)


@torch.no_grad()
def load_model(module: nn.Module, topology: Topology, source: Source, strict: bool = True) -> None:
    """Read all weights and buffers.

    Args:
        strict: refuse missing and unexpected names, as ``nn.Module.load_state_dict`` does.

    Raises:
        ValueError: names (if strict) or shapes that differ, listing them.
    """
    _fill(module, model_state(module, topology), source, strict)


@torch.no_grad()
def load_checkpointed(module: nn.Module, topology: Topology, source: Source, strict: bool = True) -> None:
    """Read what checkpoints of a module hold: :meth:`load_model` where that is all.

    Where it is not, names are always compared: other weights than those are given by ``initial_weights()`` and not
    saved, so that a checkpoint's would be lost at the next.
    """
    wanted = model_state(module, topology)
    kept = checkpointed(module, wanted)
    _fill(module, kept, source, strict or len(kept) < len(wanted))


def loads_itself(module: nn.Module) -> bool:
    """Whether a module has a ``load_state_dict`` of its own, which is called where it holds whole weights."""
    return getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict


def _fill(module: nn.Module, wanted: dict[str, GlobalTensor], source: Source, strict: bool) -> None:
    saved = {path[1]: entry for path, entry in source.saved.items() if path[0] == MODEL}
    require_fitting({name: tuple(t.shape) for name, t in wanted.items()}, saved, strict)
    tensors = state_dict_tensors(module)
    # A tied parameter is read once, under the first name there is.
    names = {id(tensors[name]): name for name in reversed(wanted) if name in saved}
    source.fill({(MODEL, name): wanted[name] for name in names.values()})


def require_fitting(wanted: Mapping[str, tuple[int, ...]], saved: Mapping[str, Described], strict: bool) -> None:
    """Raise ``ValueError`` listing the names and shapes by which a checkpoint does not fit the model."""
    problems = []
    if strict:
        problems += _listed("missing from the checkpoint", [name for name in wanted if name not in saved])
        problems += _listed("in the checkpoint but not in the model", [name for name in saved if name not in wanted])
    wrong = [name for name, shape in wanted.items() if name in saved and tuple(saved[name].shape) != shape]
    problems += _listed(
        "of another shape", [f"{name} (saved {list(saved[name].shape)}, model {list(wanted[name])})" for name in wrong]
    )
    if problems:
        hint = "" if wrong else "; LightningModule.strict_loading=False loads what fits"
        raise UserValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}{hint}")


def _listed(what: str, names: list[str], most: int = 8) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(names[:most])}{more}"] if names else []
