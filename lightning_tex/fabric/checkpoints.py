"""What ``fabric.save`` and ``fabric.load`` are given, in the forms of a Trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.fabric.utilities.types import _Stateful
from torch import nn

from lightning_tex.optim import TiledOptimizer, as_one
from lightning_tex.parallel.errors import UserTypeError, UserValueError
from lightning_tex.saving import CheckpointFormat, ShardedRun, SideGroup, located, reading_format
from lightning_tex.saving.checkpoint_format import OWN_ENTRY

# Where a Trainer's checkpoints have weights and states: other entries of a state go by the user's names.
_WEIGHTS, _STATES = "state_dict", "optimizer_states"


class _Parts(NamedTuple):
    """A state that was given, taken apart.

    Args:
        module: the sharded model's name, if it is there.
        optimizers: those that are there, in the order in which they were set up.
        others: everything else.
    """

    module: str | None
    optimizers: list[TiledOptimizer]
    others: dict[str, Any]


def _taken_apart(state: Mapping[str, Any], run: ShardedRun, known: list[TiledOptimizer]) -> _Parts:
    modules = [name for name, value in state.items() if value is run.module]
    strangers = [name for name, value in state.items() if isinstance(value, nn.Module) and value is not run.module]
    taken = sorted({_WEIGHTS, _STATES, OWN_ENTRY} & state.keys())
    if strangers or taken:
        raise UserValueError(
            f"a checkpoint's state has {', '.join(strangers or taken)}; legal: the module and the optimizers that "
            f"fabric.setup has given, and other values under other names than {_WEIGHTS}, {_STATES}, {OWN_ENTRY}"
        )
    optimizers = [one for one in known if any(one is value for value in state.values())]
    own = [run.module, *optimizers]
    others = {name: value for name, value in state.items() if not any(value is one for one in own)}
    return _Parts(next(iter(modules), None), optimizers, others)


def save(
    form: CheckpointFormat,
    run: ShardedRun,
    known: list[TiledOptimizer],
    path: Any,
    state: Mapping[str, Any],
    side_group: Callable[[], SideGroup],
) -> None:
    """Write a state; collective.

    Args:
        form: a directory, or a plain file.
        run: the model, without optimizers.
        known: all optimizers that were set up.
        path: where.
        state: as :meth:`lightning.fabric.Fabric.save` takes it, unwrapped: it has the module.
        side_group: gives the ranks as a group for what a directory's writers tell each other.

    Raises:
        ValueError: a state without the module, or with what cannot be saved.
    """
    parts = _taken_apart(state, run, known)
    if parts.module is None:
        raise UserValueError("fabric.save: the state has no module; legal: {'model': model, ..}")
    run = replace(run, optimizer=as_one(parts.optimizers))
    checkpoint: dict[str, Any] = {
        name: value.state_dict() if isinstance(value, _Stateful) else value for name, value in parts.others.items()
    }
    checkpoint[_WEIGHTS] = form.model_state(run)
    if parts.optimizers:
        checkpoint[_STATES] = [form.optimizer_state(replace(run, optimizer=one)) for one in parts.optimizers]
    begun = form.begin(run, checkpoint, path, linked=False)
    if begun is not None:
        begun.finish(side_group())


def load(
    run: ShardedRun,
    known: list[TiledOptimizer],
    path: Any,
    state: dict[str, Any],
    strict: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    """Read a checkpoint of either form and any layout, a Trainer's too, into a state; collective.

    Args:
        run, known, path: see :func:`save`.
        state: what is read into; it has the module.
        strict: refuse names of weights, and of other entries, that are not in both.
        weights_only: as of ``torch.load``; ``None``: True.

    Returns:
        what is in the checkpoint and not in the state.

    Raises:
        KeyError: an entry that the checkpoint does not have, if strict.
        ValueError: it is damaged, or does not fit.
    """
    parts = _taken_apart(state, run, known)
    if parts.module is None:
        raise UserValueError("fabric.load: the state has no module to read into; legal: {'model': model, ..}")
    run = replace(run, optimizer=as_one(parts.optimizers))
    found = located(run.broadcast(str(path)), run.checkpoint_io)
    form = reading_format(found)
    loaded = form.load(run, found, weights_only, strict)
    of_model = form.load_model(run, loaded.trainer_state, strict)
    loaded.finish(run)
    of_model(run)
    rest = {key: value for key, value in loaded.trainer_state.items() if key not in (_WEIGHTS, _STATES)}
    for name, value in parts.others.items():
        if name not in rest:
            if strict:
                raise KeyError(f"{found} has no {name!r}; it has {', '.join(map(repr, rest)) or 'nothing else'}")
        elif isinstance(value, _Stateful):
            value.load_state_dict(rest.pop(name))
        else:
            state[name] = rest.pop(name)
    return rest


def require_no_filter(filter: Any) -> None:
    """Refuse to leave out entries of a state, which ranks have parts of."""
    if filter:
        raise UserTypeError(
            "fabric.save(filter=..) is not supported; legal: leave the optimizer out of the state, or let the module's "
            "checkpointed_names() tell which weights are saved"
        )
