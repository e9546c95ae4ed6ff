"""Weights that a directory holds beside the model's, such as averages: they stand in the trainer's state as they are
loaded, a rank's own part of each, and are taken out of it to be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lightning_tex.saving.checkpoint_format import ShardedRun
from lightning_tex.saving.global_tensor import GlobalTensor, stored_part
from lightning_tex.saving.model_state import MODEL, Source, TensorPath, shardings_by_identity, state_dict_tensors

# The root of their tensors' paths, and in our entry of a directory: where each set stands in the trainer's state.
FURTHER: Final = "further_weights"
# Where Lightning has the model's.
_STATE_DICT: Final = ("state_dict",)


def taken_out(trainer_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take sets of described tensors out of a trainer's state.

    Returns:
        the sets by number, to be written under :data:`FURTHER`; and our entry, which says where they belong.
    """
    found = list(_sets(trainer_state))
    for keys, _ in found:
        _put(trainer_state, keys, {})
    return {str(n): weights for n, (_, weights) in enumerate(found)}, {FURTHER: [list(keys) for keys, _ in found]}


def put_back(run: ShardedRun, trainer_state: dict[str, Any], source: Source, own: Mapping[str, Any]) -> None:
    """Put this rank's part of every set where it belongs; and of the model's weights, if there are others."""
    places = own.get(FURTHER, [])
    for number, keys in enumerate(places):
        _put(trainer_state, tuple(keys), _own_part(run, source, (FURTHER, str(number))))
    if places:
        _put(trainer_state, _STATE_DICT, _own_part(run, source, (MODEL,)))


def put_whole(trainer_state: dict[str, Any], tensors: Mapping[TensorPath, Tensor], own: Mapping[str, Any]) -> None:
    """Put whole tensors where they belong."""
    for number, keys in enumerate(own.get(FURTHER, [])):
        root = (FURTHER, str(number))
        _put(trainer_state, tuple(keys), {path[2]: value for path, value in tensors.items() if path[:2] == root})


def _sets(state: Mapping[Any, Any], keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for key, value in state.items():
        if not isinstance(value, Mapping) or not value:
            continue
        if all(isinstance(entry, GlobalTensor) for entry in value.values()):
            yield (*keys, key), dict(value)
        else:
            yield from _sets(value, (*keys, key))


def _put(state: dict[Any, Any], keys: tuple[Any, ...], weights: dict[str, Any]) -> None:
    """Replace what is below keys; every dict on the way is copied first, as others may hold it."""
    *way, last = keys
    for key in way:
        state[key] = dict(state[key])
        state = state[key]
    state[last] = weights


def _own_part(run: ShardedRun, source: Source, root: TensorPath) -> dict[str, Tensor]:
    known = shardings_by_identity(run.module, run.topology)
    parts: dict[str, Tensor] = {}
    request: dict[TensorPath, GlobalTensor] = {}
    for name, value in state_dict_tensors(run.module).items():
        path = (*root, name)
        if path not in source.saved:
            continue
        saved = source.saved[path]
        parts[name] = part = torch.zeros(value.shape, dtype=saved.dtype)
        sharding = known.get(id(value))
        request[path] = (
            GlobalTensor.whole(part)
            if sharding is None
            else GlobalTensor(sharding.box.full, saved.dtype, [stored_part(sharding.box, part)])
        )
    source.fill(request)
    return parts
