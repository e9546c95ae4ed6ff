"""Writing a folder of weights: every rank its elements at their places in files that all see, the name last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.topology import Axis
from lightning_tex.pretrained.folder import INDEX, ONE_FILE
from lightning_tex.pretrained.rules import Bindings, Piece
from lightning_tex.pretrained.tensor_file import SUFFIX, StoredTensor, TensorFiles, create, laid_out, slabs
from lightning_tex.saving import paths
from lightning_tex.saving.archive import NewFile, write_file
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.local_store import LocalStore, sync
from lightning_tex.saving.writing import Broadcast

Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Weights:
    """What is written of a model.

    Args:
        bindings: what of the files is what of the model.
        tensors: the parameters, of which this rank holds parts; by name.
        dtype: of the tensors in files for which no rule says one.
        shard_bytes: a file has at most so many bytes of elements, unless it has one tensor alone.
        one_file: its name where there is just one.
    """

    bindings: Bindings
    tensors: Mapping[str, GlobalTensor]
    dtype: torch.dtype
    shard_bytes: int
    one_file: str = ONE_FILE

    def kinds(self) -> Kinds:
        """Dtype and shape of every tensor in files, in the order of the rules."""
        given = self.bindings.dtypes
        return {name: (given.get(name, self.dtype), shape) for name, shape in self.bindings.stored.items()
                if name not in self.bindings.copies}  # fmt: skip


def write_folder(
    folder: Path,
    weights: Weights,
    files: Mapping[str, bytes],
    world: Axis,
    broadcast: Broadcast,
) -> None:
    """Write weights and further files to a new folder, which appears when it is complete; collective.

    Besides the weights it takes the memory of one slab of a tensor.

    Args:
        folder: the same on all ranks, which all see it.
        weights: of the model.
        files: what else is to lie there, by name; rank 0's are written.
        world: all ranks.
        broadcast: sends rank 0's object to all ranks.

    Raises:
        RuntimeError: on all ranks, naming every one that cannot write; nothing is left.
    """
    partial = Path(broadcast(str(paths.partial_name(folder))))
    groups = sharded(weights.kinds(), weights.shard_bytes, weights.one_file)
    shards = {partial / name: kinds for name, kinds in groups.items()}
    wanted = sum(_bytes(kinds) for kinds in shards.values())

    def prepare() -> int:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists; nothing is written over it")
        partial.mkdir(parents=True)
        for path, kinds in shards.items():
            create(path, kinds)
        for name, content in {**files, **_index(shards)}.items():
            write_file(NewFile(partial / name, len(content)), content)
        return 0

    def finish() -> int:
        sync(partial)
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)
        sync(folder.parent)
        return 0

    try:
        _together(folder, prepare if world.rank == 0 else None, world)
        places = {stored.name: stored for path, kinds in shards.items() for stored in laid_out(path, kinds)}
        written = _together(folder, lambda: _write(weights, places), world)
        assert written == wanted, f"{written} of {wanted} bytes were written"
        _together(folder, finish if world.rank == 0 else None, world)
    finally:
        if world.rank == 0:
            LocalStore().remove(partial)


def sharded(kinds: Kinds, shard_bytes: int, one_file: str = ONE_FILE) -> dict[str, Kinds]:
    """Which file holds which tensors: in their order, a new file where one is full."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    for name, kind in kinds.items():
        if groups[-1] and _bytes(groups[-1]) + _bytes({name: kind}) > shard_bytes:
            groups.append({})
        groups[-1][name] = kind
    # Wide elements first: readers take each tensor's first byte for a multiple of its elements' size.
    groups = [dict(sorted(group.items(), key=lambda item: -item[1][0].itemsize)) for group in groups]
    if len(groups) == 1:
        return {one_file: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}{SUFFIX}": group for number, group in enumerate(groups, 1)}


def _index(shards: Mapping[Path, Kinds]) -> dict[str, bytes]:
    if len(shards) == 1:
        return {}
    metadata = {
        "total_parameters": sum(prod(shape) for kinds in shards.values() for _, shape in kinds.values()),
        "total_size": sum(map(_bytes, shards.values())),
    }
    weight_map = {name: path.name for path, kinds in shards.items() for name in kinds}
    return {INDEX: as_json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})}


def as_json(content: Mapping[str, Any]) -> bytes:
    """An object as the text of a file."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _bytes(kinds: Kinds) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in kinds.values())


# --- this rank's elements


def _write(weights: Weights, places: Mapping[str, StoredTensor]) -> int:
    """Write all that this rank is to; how many bytes that was."""
    with TensorFiles(writes=True) as files:
        for group in _groups(weights.bindings):
            first = weights.tensors[group[0].parameter]
            for number, part in enumerate(first.parts if first.writes else ()):
                parts = [weights.tensors[piece.parameter].parts[number] for piece in group]
                _write_parts(files, places[group[0].stored], group, parts, part.extent.intersect(group[0].target))
        files.sync()
        return files.moved_bytes


def _groups(bindings: Bindings) -> Iterator[list[Piece]]:
    """Pieces that are written at once: alone, or all of a tensor where they take turns."""
    by_tensor: dict[str, list[Piece]] = {}
    for pieces in bindings.pieces.values():
        for piece in pieces:
            by_tensor.setdefault(piece.stored, []).append(piece)
    for pieces in by_tensor.values():
        yield from [[piece] for piece in pieces] if pieces[0].dense else [pieces]


def _write_parts(
    files: TensorFiles, place: StoredTensor, group: list[Piece], parts: list[Part], common: Extent
) -> None:
    """Write the same extent of parameters that are sharded alike."""
    if not common.numel:
        return
    values = [part.read().detach() for part in parts]
    for slab in slabs(common, place.dtype.itemsize):
        rectangle = _around([piece.source(slab) for piece in group])
        elements = torch.empty(rectangle.sizes, dtype=place.dtype)
        for piece, part, value in zip(group, parts, values, strict=True):
            inside: Tensor = elements[piece.source(slab).within(rectangle).slices]
            piece.taken(inside, slab).copy_(value[slab.within(part.extent).slices])
        files.write(place, rectangle, elements)


def _around(extents: list[Extent]) -> Extent:
    offsets = tuple(map(min, *(extent.offsets for extent in extents))) if len(extents) > 1 else extents[0].offsets
    stops = tuple(map(max, *(extent.stops for extent in extents))) if len(extents) > 1 else extents[0].stops
    return Extent(offsets, tuple(stop - start for start, stop in zip(offsets, stops, strict=True)))


# --- together


def _together(folder: Path, act: Callable[[], int] | None, world: Axis) -> int:
    """``act()`` on the ranks that have one, and the sum of what it gave; what fails on one is raised on all."""
    result, problem = 0, None
    try:
        result = act() if act is not None else 0
    except Exception as error:
        if world.size == 1:
            raise
        problem = f"rank {world.rank}: {type(error).__name__}: {error}"
    every: list[Any] = [(result, problem)] * world.size
    if world.size > 1:
        with TRAINING.inside("all_gather of an object", world):
            dist.all_gather_object(every, (result, problem), group=world.group)
    if problems := [problem for _, problem in every if problem]:
        raise UserRuntimeError(f"{folder} cannot be written: {'; '.join(problems)}")
    return sum(count for count, _ in every)
