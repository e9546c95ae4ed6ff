"""Optimizer states of a sharded model, described globally, to be written from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_tex.optim import Stepped, one_by_one
from lightning_tex.optim.formats import SavedState
from lightning_tex.optim.shard import Piece
from lightning_tex.optim.tiled import parameter_names
from lightning_tex.parallel.errors import UserTypeError
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import OPTIMIZERS

# The name that the rounding seed has in a directory of format 1, and in a plain file of 0.1.
ROUNDING_SEED = "dice"
# How many of the groups each optimizer has, in their order. Directories without it are of one.
GROUPS_OF_EACH = "groups_of_each"
# What each optimizer's states lie under. Directories without it have all of them under the first one's.
ROOTS = "roots"


def window_states(piece: Piece) -> dict[str, Any]:
    """The states of a piece's window: :class:`SavedState` values, scalars, and the master of a 16-bit parameter.

    Raises:
        TypeError: a state that is neither one value nor one value per element.
    """
    states = piece.shard.states.saved_states(piece.window)
    for key, value in states.items():
        if not isinstance(value, SavedState) and not is_scalar(value):
            raise UserTypeError(
                f"optimizer state {key!r} is neither one number nor one number per element: {value!r:.200}"
            )
    return states


def is_scalar(value: Any) -> bool:
    """Whether a state is one number."""
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (bool, int, float))


def optimizer_state(optimizer: Stepped) -> dict[str, dict[str, GlobalTensor]]:
    """Optimizer states by parameter name and key. Scalars, equal for all elements of a parameter, have shape []."""
    optimizer.refresh()
    states: dict[str, dict[str, GlobalTensor]] = {}
    for piece in optimizer.pieces():
        sharding = piece.sharding
        writes = sharding.counted and piece.writes
        for key, value in window_states(piece).items():
            described = states.setdefault(sharding.name, {})
            if isinstance(value, SavedState):
                shape = piece.whole_shape(value.shape or ())
                tensor = described.setdefault(key, GlobalTensor(shape, value.dtype, writes=writes))
                tensor.parts += held_parts(piece, value.read, value.shape or ())
            elif piece.holds_first_element:
                described[key] = GlobalTensor.whole(torch.as_tensor(value), writes)
    return states


def foreseen_bytes(optimizer: Stepped) -> int:
    """What this rank writes of the states in a checkpoint; before the first step, too, when there are none yet."""
    return sum(piece.foreseen_bytes for piece in optimizer.pieces() if piece.sharding.counted and piece.writes)


def held_parts(piece: Piece, read: Callable[[], Tensor], shape: tuple[int, ...]) -> Iterator[Part]:
    """The elements of a piece in its global tensor, as views of what ``read`` gives of its window, in that shape."""
    for extent, view in piece.extents(shape):
        yield Part(extent, partial(_viewed, read, view))


def _viewed(read: Callable[[], Tensor], view: Callable[[Tensor], Tensor]) -> Tensor:
    return view(read())


def number_keys(optimizer: Stepped) -> list[str]:
    """Keys of states that are Python numbers, not tensors."""
    states = (piece.shard.states.saved_states(piece.window) for piece in optimizer.pieces())
    return sorted({key for state in states for key, value in state.items() if isinstance(value, (int, float))})


def group_options(optimizer: Stepped) -> list[dict[str, Any]]:
    """Every group's options, with its parameters by name."""
    names = parameter_names(optimizer.param_groups, optimizer.shardings)
    return [
        {**{key: value for key, value in group.items() if key != "params"}, "params": members}
        for group, members in zip(optimizer.param_groups, names, strict=True)
    ]


def roots(optimizer: Stepped) -> list[str]:
    """What each optimizer's states lie under: one place, unless a parameter has states of several."""
    each = one_by_one(optimizer)
    apart = len(each) > 1 and each[0].buffers.are_shared
    return [OPTIMIZERS.format(number if apart else 0) for number in range(len(each))]


def optimizer_entry(optimizer: Stepped) -> dict[str, Any]:
    """What a directory's ``meta.pt`` says of the optimizer, beside its tensors."""
    return {
        "param_groups": group_options(optimizer),
        "numbers": number_keys(optimizer),
        ROOTS: roots(optimizer),
        GROUPS_OF_EACH: [len(one.param_groups) for one in one_by_one(optimizer)],
        ROUNDING_SEED: asdict(optimizer.rounding_seed),
    }
