"""Optimizer states of a cut model, described globally, to be written from or read into in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tex.optim import TiledOptimizer
from lightning_tex.optim.engine import fastest
from lightning_tex.optim.tiled import Piece, parameter_names
from lightning_tex.saving.sharded import GlobalTensor, Part, range_parts
from lightning_tex.saving.state import MASTER, MODEL, OPTIMIZER, Path, Saved, Source

# --- what there is


def window_states(optimizer: TiledOptimizer, piece: Piece) -> dict[str, Any]:
    """The states of a piece's tile: whole windows ([tile]), scalars, and the master of a 16-bit parameter.

    Raises:
        TypeError: a state that is neither one value nor one value per element.
    """
    states = {key: v for key, v in optimizer.engine.state.get(piece.tile, {}).items() if v is not None}
    for key, value in states.items():
        if not is_window(value, piece) and not is_scalar(value):
            raise TypeError(f"optimizer state {key!r} is neither one number nor one number per element: {value!r:.200}")
    if has_master(piece):
        states[MASTER] = piece.tile.detach()
    return states


def is_window(value: Any, piece: Piece) -> bool:
    """Whether a state has one value per element of its tile."""
    return isinstance(value, Tensor) and value.shape == piece.tile.shape


def is_scalar(value: Any) -> bool:
    """Whether a state is one number."""
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (bool, int, float))


def has_master(piece: Piece) -> bool:
    """Whether the tile is a copy of higher precision, not the parameter's own memory."""
    return piece.tile.dtype != piece.parameter.dtype


def optimizer_state(optimizer: TiledOptimizer) -> dict[str, dict[str, GlobalTensor]]:
    """Optimizer states by parameter name and key. Scalars, equal for all elements of a parameter, have shape []."""
    optimizer.refresh()
    parts: dict[tuple[str, str], list[Part]] = {}
    kinds: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype, bool]] = {}
    for piece in optimizer.pieces():
        placement = piece.placement
        for key, value in window_states(optimizer, piece).items():
            path = (placement.name, key)
            if is_window(value, piece):
                held = parts.setdefault(path, [])
                held += range_parts(placement.box, piece.start, value[piece.own])
                kinds[path] = placement.box.whole, value.dtype, placement.counted
            elif holds_first_element(piece):
                number = torch.as_tensor(value)
                parts[path] = [Part((), number)]
                kinds[path] = (), number.dtype, placement.counted
    state: dict[str, dict[str, GlobalTensor]] = {}
    for (name, key), (shape, dtype, writes) in kinds.items():
        state.setdefault(name, {})[key] = GlobalTensor(shape, dtype, parts[name, key], writes)
    return state


def holds_first_element(piece: Piece) -> bool:
    """Whether the piece has the parameter's first element: true once over replicas and cut axes."""
    return piece.start == 0 and not any(piece.placement.box.offsets)


def number_keys(optimizer: TiledOptimizer) -> list[str]:
    """Keys of states that are Python numbers, not tensors."""
    states = optimizer.engine.state.values()
    return sorted({key for state in states for key, value in state.items() if isinstance(value, (int, float))})


def group_options(optimizer: TiledOptimizer) -> list[dict[str, Any]]:
    """Every group's options, with its parameters by name."""
    names = parameter_names(optimizer.param_groups, optimizer.placements)
    return [
        {**{key: value for key, value in group.items() if key != "params"}, "params": own}
        for group, own in zip(optimizer.param_groups, names, strict=True)
    ]


# --- reading


@torch.no_grad()
def load_optimizer(optimizer: TiledOptimizer, source: Source, groups: list[dict[str, Any]], numbers: list[str]) -> None:
    """Read all states, whatever the layout they come from, and take over the groups' options.

    Args:
        groups: options with parameter names, as :func:`group_options` gives.
        numbers: keys whose states are Python numbers.

    Raises:
        ValueError: the groups hold other parameters.
    """
    _require_same_groups([group["params"] for group in groups], group_options(optimizer))
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        # In place, because schedulers hold the group itself.
        group.update({key: value for key, value in options.items() if key not in ("params", "param_names")})
    saved: dict[str, dict[str, Saved]] = {}
    for path, entry in source.saved.items():
        if path[:2] == (OPTIMIZER, "state") and path[3] != MASTER:
            saved.setdefault(path[2], {})[path[3]] = entry
    scalar = _scalar_keys(saved, optimizer)
    optimizer.engine.state.clear()
    request: dict[Path, GlobalTensor] = {}
    for piece, key, entry in _states_to_read(optimizer, saved):
        path = (OPTIMIZER, "state", piece.placement.name, key)
        if key in scalar:
            if path not in request:
                request[path] = GlobalTensor((), entry.dtype, [Part((), torch.zeros((), dtype=entry.dtype))])
            continue
        window = _allocated(optimizer, piece, key, entry)
        _request_window(request, path, piece, window)
    source.fill(request)
    _set_scalars(optimizer, request, saved, scalar, numbers)


def _require_same_groups(saved: list[list[str]], groups: list[dict[str, Any]]) -> None:
    if len(saved) != len(groups):
        raise ValueError(f"the checkpoint's optimizer has {len(saved)} parameter groups, this one has {len(groups)}")
    for index, (names, group) in enumerate(zip(saved, groups, strict=True)):
        differing = set(names) ^ set(group["params"])
        if differing:
            raise ValueError(
                f"optimizer group {index} holds other parameters than in the checkpoint; only in one of them: "
                f"{', '.join(sorted(differing)[:8])}"
            )


def _scalar_keys(saved: dict[str, dict[str, Saved]], optimizer: TiledOptimizer) -> set[str]:
    # The states of a 0-dim parameter have shape [] too, so other parameters tell.
    dims = {placement.name: len(placement.box.whole) for placement in optimizer.placements.values()}
    return {"step"} | {
        key for name, states in saved.items() for key, entry in states.items() if not entry.shape and dims.get(name)
    }


def _states_to_read(
    optimizer: TiledOptimizer, saved: dict[str, dict[str, Saved]]
) -> Iterator[tuple[Piece, str, Saved]]:
    for piece in optimizer.pieces():
        for key, entry in saved.get(piece.placement.name, {}).items():
            yield piece, key, entry


def _allocated(optimizer: TiledOptimizer, piece: Piece, key: str, entry: Saved) -> Tensor:
    states = optimizer.engine.state[piece.tile]
    if key not in states:
        dtype = piece.tile.dtype if entry.dtype.is_floating_point else entry.dtype
        states[key] = torch.zeros_like(piece.tile, dtype=dtype)
    return states[key]


def _request_window(request: dict[Path, GlobalTensor], path: Path, piece: Piece, window: Tensor) -> None:
    box = piece.placement.box
    wanted = request.setdefault(path, GlobalTensor(box.whole, window.dtype))
    wanted.parts += range_parts(box, piece.start, window[piece.own])


def _set_scalars(
    optimizer: TiledOptimizer,
    request: dict[Path, GlobalTensor],
    saved: dict[str, dict[str, Saved]],
    scalar: set[str],
    numbers: list[str],
) -> None:
    groups = {shard_tile: shard.group for shard in optimizer.shards for shard_tile in shard.tiles}
    differing = set()
    for piece, key, _ in _states_to_read(optimizer, saved):
        if key not in scalar:
            continue
        value = request[OPTIMIZER, "state", piece.placement.name, key].parts[0].tensor
        states = optimizer.engine.state[piece.tile]
        if key in states and float(states[key]) != float(value):
            differing.add(key)
            value = torch.maximum(value, torch.as_tensor(states[key], dtype=value.dtype, device=value.device))
        options = fastest(optimizer.engine.optimizer, groups[piece.tile])
        # As torch places it: beside the parameter only where the kernel reads it there.
        on_device = options.get("fused") or options.get("capturable")
        states[key] = value.item() if key in numbers else value.to(piece.tile.device if on_device else "cpu", copy=True)
    if differing:
        rank_zero_warn(
            f"The optimizer's {', '.join(sorted(differing))} differs between parameters in this checkpoint, as after "
            "steps in which some had no gradient; parameters that are updated together go on with the largest"
        )


@torch.no_grad()
def load_masters(optimizer: TiledOptimizer, source: Source) -> None:
    """Read the fp32 values behind the parameters, after :func:`load_model`.

    They are the saved masters or, from a checkpoint of higher precision, the weights themselves. A master is read into
    a parameter of higher precision as well.
    """
    request: dict[Path, GlobalTensor] = {}
    for piece in optimizer.pieces():
        weight = (MODEL, piece.placement.name)
        master = (OPTIMIZER, "state", piece.placement.name, MASTER)
        if master in source.saved:
            _request_window(request, master, piece, piece.tile.detach())
        elif has_master(piece) and weight in source.saved:
            _request_window(request, weight, piece, piece.tile.detach())
    source.fill(request)
    optimizer.keep_masters()
