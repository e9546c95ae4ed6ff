"""Weights and optimizer states of a sharded model as whole tensors, gathered on rank 0."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_tex.optim import Stepped
from lightning_tex.optim.formats import MASTER, SavedState
from lightning_tex.optim.matrices.shard import MatrixShard
from lightning_tex.optim.shard import Piece, TiledPiece
from lightning_tex.parallel import collectives
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving.model_state import checkpointed, shardings_by_identity, state_dict_tensors
from lightning_tex.saving.optimizer_state import group_options, held_parts, window_states
from lightning_tex.saving.plain_form import torch_form


@torch.no_grad()
def whole_model_state(module: nn.Module, topology: Topology, optimizer: Stepped | None) -> dict[str, Tensor]:
    """What checkpoints hold of a model, whole, in host memory on rank 0, empty elsewhere; gathered one by one.

    16-bit parameters come as their fp32 masters where there is an optimizer, so that nothing is lost.
    """
    known = shardings_by_identity(module, topology)
    pieces, mastered = _pieces(optimizer), _mastered(optimizer)
    first = topology.world.rank == 0
    gathered: dict[int, Tensor] = {}  # ties stay ties
    whole: dict[str, Tensor] = {}
    for name, value in checkpointed(module, state_dict_tensors(module)).items():
        if id(value) not in gathered:
            tensor, sharding = value.detach(), known.get(id(value))
            if sharding is not None and sharding.name in mastered:
                kind = SavedKind(torch.float32, mastered[sharding.name])
                tensor = _gather_windows(sharding, MASTER, pieces, kind, _device(optimizer))
            elif sharding is not None:
                # After a fit Lightning has moved the module to the host, where the group may have no backend.
                tensor = sharding.gather(tensor.to(_device(optimizer) or tensor.device))
            gathered[id(value)] = _host(tensor) if first else tensor.new_empty(0)
        if first:
            whole[name] = gathered[id(value)]
    return whole


class SavedKind(NamedTuple):
    """What all ranks know of a state: its dtype and, where whole matrices are stepped, its global shape."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None


def _mastered(optimizer: Stepped | None) -> dict[str, tuple[int, ...] | None]:
    """Names of the parameters that have a master, on whatever rank, with the shape of :class:`SavedKind`."""
    if optimizer is None:
        return {}
    optimizer.refresh()
    return {
        entry.sharding.name: entry.sharding.box.full if isinstance(shard, MatrixShard) else None
        for shard in optimizer.shards
        if shard.states.has_master
        for entry in shard.buffer.entries
    }


@torch.no_grad()
def whole_optimizer_state(optimizer: Stepped, topology: Topology) -> dict[str, Any]:
    """Optimizer state in torch's own form, whole, in host memory on rank 0, empty elsewhere; collective."""
    pieces = _pieces(optimizer)
    shardings = {sharding.name: sharding for sharding in optimizer.shardings.values()}
    states: dict[str, dict[str, Any]] = {}
    for name, kinds in _agreed_keys(optimizer, topology).items():
        values = {}
        for key, kind in kinds.items():
            if isinstance(kind, SavedKind):
                values[key] = _host(_gather_windows(shardings[name], key, pieces, kind, _device(optimizer)))
            else:
                values[key] = kind
        states[name] = values
    return torch_form(states, group_options(optimizer)) if topology.world.rank == 0 else {}


def _agreed_keys(optimizer: Stepped, topology: Topology) -> dict[str, dict[str, Any]]:
    """Per parameter and key: the kind of a state that is a tensor, or the value of a scalar."""
    own: dict[str, dict[str, Any]] = {}
    for piece in optimizer.pieces():
        for key, value in window_states(piece).items():
            if key == MASTER:
                continue
            kinds = own.setdefault(piece.sharding.name, {})
            if isinstance(value, SavedState):
                shape = None if value.shape is None else piece.whole_shape(value.shape)
                kinds[key] = SavedKind(value.dtype, shape)
            elif piece.holds_first_element:
                kinds[key] = value.cpu().clone() if isinstance(value, Tensor) else value
    every: list[Any] = [own]
    if topology.world.size > 1:
        every = [None] * topology.world.size
        with TRAINING.inside("all_gather of an object", topology.world):
            dist.all_gather_object(every, own)
    agreed: dict[str, dict[str, Any]] = {}
    for kept in every:
        for name, kinds in kept.items():
            agreed.setdefault(name, {}).update(kinds)
    return {name: dict(sorted(kinds.items())) for name, kinds in sorted(agreed.items())}


def _pieces(optimizer: Stepped | None) -> dict[str, list[Piece]]:
    by_name: dict[str, list[Piece]] = {}
    for piece in optimizer.pieces() if optimizer is not None else ():
        by_name.setdefault(piece.sharding.name, []).append(piece)
    return by_name


def _gather_windows(
    sharding: ParameterSharding,
    key: str,
    pieces: dict[str, list[Piece]],
    kind: SavedKind,
    device: torch.device | None,
) -> Tensor:
    """A whole state from the windows the ranks hold of it; collective over replicas and sharded axes."""
    here = [piece for piece in pieces.get(sharding.name, []) if piece.writes]
    if kind.shape is not None:
        return _gather_matrices(sharding, key, here, kind, device)
    stored = torch.zeros(sharding.box.stored, dtype=kind.dtype, device=device)
    for piece in here:
        if isinstance(piece, TiledPiece):
            stored.view(-1)[piece.stored.slices] = window_states(piece)[key].read()[piece.held.slices]
    # Each element is in one rank's window, so a sum of bytes brings them together bit for bit.
    joined = collectives.all_reduce(stored.view(-1).view(torch.uint8), sharding.replicas)
    return sharding.gather(joined.view(kind.dtype).view(stored.shape))


def _gather_matrices(
    sharding: ParameterSharding, key: str, here: list[Piece], kind: SavedKind, device: torch.device | None
) -> Tensor:
    """A whole state of matrices, each of which is on one of the ranks that have parts of the parameter."""
    assert kind.shape is not None
    whole = torch.zeros(kind.shape, dtype=kind.dtype, device=device)
    for piece in here:
        state = window_states(piece)[key]
        for part in held_parts(piece, state.read, state.shape):
            whole[part.extent.slices] = part.read()
    joined = whole.view(-1).view(torch.uint8)
    for axis in (sharding.replicas, *(axis for axis, _ in sharding.shard_dims)):
        joined = collectives.all_reduce(joined, axis)
    return joined.view(kind.dtype).view(kind.shape)


def _device(optimizer: Stepped | None) -> torch.device | None:
    return optimizer.shards[0].buffer.parameters.device if optimizer is not None and optimizer.shards else None


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
