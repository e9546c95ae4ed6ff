"""Optimizer states of a sharded model, described globally, to be written from or read into in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tex.errors import UserTypeError, UserValueError
from lightning_tex.optim import TiledOptimizer
from lightning_tex.optim.engine import fastest
from lightning_tex.optim.formats import LOW_PRECISION, MASTER, Kept
from lightning_tex.optim.shard import Piece, Shard
from lightning_tex.optim.tiled import parameter_names
from lightning_tex.saving.sharded import GlobalTensor, Part, range_parts
from lightning_tex.saving.state import MODEL, OPTIMIZER, Path, Saved, Source

# --- what there is


def window_states(piece: Piece) -> dict[str, Any]:
    """The states of a piece's window: :class:`Kept` values, scalars, and the master of a 16-bit parameter.

    Raises:
        TypeError: a state that is neither one value nor one value per element.
    """
    states = piece.shard.states.kept(piece.window)
    for key, value in states.items():
        if not isinstance(value, Kept) and not is_scalar(value):
            raise UserTypeError(
                f"optimizer state {key!r} is neither one number nor one number per element: {value!r:.200}"
            )
    return states


def is_scalar(value: Any) -> bool:
    """Whether a state is one number."""
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (bool, int, float))


def optimizer_state(optimizer: TiledOptimizer) -> dict[str, dict[str, GlobalTensor]]:
    """Optimizer states by parameter name and key. Scalars, equal for all elements of a parameter, have shape []."""
    optimizer.refresh()
    parts: dict[tuple[str, str], list[Part]] = {}
    kinds: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype, bool]] = {}
    for piece in optimizer.pieces():
        sharding = piece.sharding
        for key, value in window_states(piece).items():
            path = (sharding.name, key)
            writes = sharding.counted and piece.writes
            if isinstance(value, Kept):
                held = parts.setdefault(path, [])
                held += range_parts(sharding.box, piece.start, piece.stop - piece.start, partial(_own, value, piece))
                kinds[path] = sharding.box.full, value.dtype, writes
            elif holds_first_element(piece):
                number = torch.as_tensor(value)
                parts[path] = [Part.of((), number)]
                kinds[path] = (), number.dtype, writes
    state: dict[str, dict[str, GlobalTensor]] = {}
    for (name, key), (shape, dtype, writes) in kinds.items():
        state.setdefault(name, {})[key] = GlobalTensor(shape, dtype, parts[name, key], writes)
    return state


def _own(kept: Kept, piece: Piece) -> Tensor:
    return kept.read()[piece.own]


def holds_first_element(piece: Piece) -> bool:
    """Whether the piece has the parameter's first element: true once over replicas and sharded axes."""
    return piece.start == 0 and not any(piece.sharding.box.offsets)


def number_keys(optimizer: TiledOptimizer) -> list[str]:
    """Keys of states that are Python numbers, not tensors."""
    states = (piece.shard.states.kept(piece.window) for piece in optimizer.pieces())
    return sorted({key for state in states for key, value in state.items() if isinstance(value, (int, float))})


def group_options(optimizer: TiledOptimizer) -> list[dict[str, Any]]:
    """Every group's options, with its parameters by name."""
    names = parameter_names(optimizer.param_groups, optimizer.shardings)
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
    require_same_groups(groups, optimizer)
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        # In place, because schedulers hold the group itself.
        group.update({key: value for key, value in options.items() if key not in ("params", "param_names")})
    saved: dict[str, dict[str, Saved]] = {}
    for path, entry in source.saved.items():
        if path[:2] == (OPTIMIZER, "state") and path[3] != MASTER:
            saved.setdefault(path[2], {})[path[3]] = entry
    scalar = _scalar_keys(saved, optimizer)
    for shard in optimizer.shards:
        shard.states.forget()
        # Shard by shard: a compact format reads into memory that is given back.
        _load_elements(shard, source, saved, scalar)
    _load_scalars(optimizer, source, saved, scalar, numbers)


def _load_elements(shard: Shard, source: Source, saved: dict[str, dict[str, Saved]], scalar: set[str]) -> None:
    wanted: dict[tuple[int, str], torch.dtype] = {}
    for piece in shard.pieces():
        for key, entry in saved.get(piece.sharding.name, {}).items():
            if key not in scalar:
                wanted[piece.window, key] = entry.dtype
    _read_windows(shard, source, wanted, lambda piece, key: (OPTIMIZER, "state", piece.sharding.name, key))


def _read_windows(
    shard: Shard,
    source: Source,
    wanted: Mapping[tuple[int, str], torch.dtype],
    path_of: Callable[[Piece, str], Path],
) -> None:
    """Read states of a shard's windows, by (window, key), from where ``path_of`` says."""
    places = {(window, key): shard.states.place(window, key, dtype) for (window, key), dtype in wanted.items()}
    request: dict[Path, GlobalTensor] = {}
    for piece in shard.pieces():
        for (window, key), place in places.items():
            path = path_of(piece, key)
            if window == piece.window and path in source.saved:
                box = piece.sharding.box
                requested = request.setdefault(path, GlobalTensor(box.full, place.dtype))
                requested.parts += range_parts(box, piece.start, piece.stop - piece.start, partial(_part, place, piece))
    source.fill(request)
    for (window, key), place in places.items():
        shard.states.placed(window, key, place)


def _part(place: Tensor, piece: Piece) -> Tensor:
    return place[piece.own]


def require_same_groups(saved: list[dict[str, Any]], optimizer: TiledOptimizer) -> None:
    """Raise ``ValueError`` if the groups of a checkpoint hold other parameters than the optimizer's."""
    groups = group_options(optimizer)
    if len(saved) != len(groups):
        raise UserValueError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, this one has {len(groups)}"
        )
    for index, (theirs, own) in enumerate(zip(saved, groups, strict=True)):
        differing = set(theirs["params"]) ^ set(own["params"])
        if differing:
            raise UserValueError(
                f"optimizer group {index} holds other parameters than in the checkpoint; only in one of them: "
                f"{', '.join(sorted(differing)[:8])}"
            )


def _scalar_keys(saved: dict[str, dict[str, Saved]], optimizer: TiledOptimizer) -> set[str]:
    # The states of a 0-dim parameter have shape [] too, so other parameters tell.
    dims = {sharding.name: len(sharding.box.full) for sharding in optimizer.shardings.values()}
    return {"step"} | {
        key for name, states in saved.items() for key, entry in states.items() if not entry.shape and dims.get(name)
    }


def _load_scalars(
    optimizer: TiledOptimizer,
    source: Source,
    saved: dict[str, dict[str, Saved]],
    scalar: set[str],
    numbers: list[str],
) -> None:
    read: dict[Path, Tensor] = {}
    for piece in optimizer.pieces():
        for key, entry in saved.get(piece.sharding.name, {}).items():
            if key in scalar:
                read[OPTIMIZER, "state", piece.sharding.name, key] = torch.zeros((), dtype=entry.dtype)
    source.fill({path: GlobalTensor((), value.dtype, [Part.of((), value)]) for path, value in read.items()})
    largest: dict[tuple[int, int, str], Tensor] = {}
    differing = set()
    for piece in optimizer.pieces():
        shard = piece.shard
        for key in scalar & saved.get(piece.sharding.name, {}).keys():
            value = read[OPTIMIZER, "state", piece.sharding.name, key]
            known = largest.get((id(shard), piece.window, key), value)
            if float(known) != float(value):
                differing.add(key)
                value = torch.maximum(known, value)
            largest[id(shard), piece.window, key] = value
            # As torch places it: beside the parameter only where the kernel reads it there.
            options = fastest(optimizer.engine.optimizer, shard.group)
            on_device = options.get("fused") or options.get("capturable")
            device = shard.buffer.parameters.device if on_device else "cpu"
            number = value.item() if key in numbers else value.to(device, copy=True)
            shard.states.set_number(piece.window, key, number)
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
    for shard in optimizer.shards:
        wanted: dict[tuple[int, str], torch.dtype] = {}
        low = shard.buffer.parameters.dtype in LOW_PRECISION
        for piece in shard.pieces():
            master, weight = _master_paths(piece)
            if (master in source.saved and not low) or (shard.states.has_master and weight in source.saved):
                wanted[piece.window, MASTER] = torch.float32

        def path_of(piece: Piece, key: str) -> Path:
            master, weight = _master_paths(piece)
            return master if master in source.saved else weight

        _read_windows(shard, source, wanted, path_of)
    optimizer.keep_states()


def _master_paths(piece: Piece) -> tuple[Path, Path]:
    name = piece.sharding.name
    return (OPTIMIZER, "state", name, MASTER), (MODEL, name)
