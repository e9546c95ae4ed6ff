"""A checkpoint as a directory: each rank writes its part by torch.distributed.checkpoint, one file holds the rest."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from pathlib import PurePath
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_tex.saving.sharded import GlobalTensor, Part
from lightning_tex.saving.state import Path, Saved
from lightning_tex.topology import Axis

_DCP_METADATA = ".metadata"
Broadcast = Callable[[Any], Any]


def is_directory_checkpoint(path: FilePath) -> bool:
    """Whether the path holds a checkpoint written by :func:`write`."""
    return path.is_dir() and (path / _METADATA_FILENAME).is_file() and (path / _DCP_METADATA).is_file()


class Directory:
    """A checkpoint directory to read tensors from; a :class:`lightning_tex.saving.state.Source`."""

    def __init__(self, path: FilePath) -> None:
        self.path = path
        metadata = FileSystemReader(path).read_metadata()
        entries = metadata.state_dict_metadata
        self.saved: dict[Path, Saved] = {
            tuple(map(str, keys)): Saved(tuple(entry.size), entry.properties.dtype)
            for name, keys in (metadata.planner_data or {}).items()
            if isinstance(entry := entries[name], TensorStorageMetadata)
        }

    def fill(self, request: Mapping[Path, GlobalTensor]) -> None:
        state = {".".join(path): tensor for path, tensor in request.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            load(state, storage_reader=FileSystemReader(self.path), planner=planner)
        except CheckpointException as error:  # a BaseException, which a user's `except Exception` would miss
            raise RuntimeError(f"cannot read the checkpoint {self.path}: {error}") from error


def write(
    path: FilePath, tensors: Mapping[str, Any], rest: Mapping[str, Any], world: Axis, broadcast: Broadcast
) -> None:
    """Write a checkpoint directory and put it in the place of what is at ``path``; collective.

    It is written beside and renamed when complete, so ``path`` never holds parts of two checkpoints.

    Args:
        path: the same on all ranks.
        tensors: nested dicts of :class:`GlobalTensor`.
        rest: everything else; rank 0's is written.
        world: all ranks.
        broadcast: sends rank 0's object to all ranks.

    Raises:
        RuntimeError: on all ranks, when one of them cannot write.
    """
    partial = path.parent / f".{path.name}.partial"
    on_first_rank(lambda: _make_empty(partial), world, broadcast)
    try:
        save(dict(tensors), storage_writer=FileSystemWriter(partial))
    except CheckpointException as error:
        raise RuntimeError(f"cannot write the checkpoint {path}: {error}") from error

    def complete() -> None:
        (partial / _METADATA_FILENAME).write_bytes(_serialised(rest))
        _replace(partial, path)

    on_first_rank(complete, world, broadcast)


def on_first_rank(act: Callable[[], None], world: Axis, broadcast: Broadcast) -> None:
    """Run ``act`` on rank 0 while the others wait. If it fails, raise on all ranks instead of leaving them waiting."""
    failure: Exception | None = None
    if world.rank == 0:
        try:
            act()
        except Exception as error:
            failure = error
    message = broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"rank 0 could not write the checkpoint: {message}")


def _make_empty(path: FilePath) -> None:
    remove(path)
    path.mkdir(parents=True)


def _replace(new: FilePath, path: FilePath) -> None:
    aside = path.parent / f".{path.name}.replaced"
    remove(aside)
    if os.path.lexists(path):
        os.rename(path, aside)  # a rename cannot replace a directory that is not empty
    os.rename(new, path)
    remove(aside)


def remove(path: FilePath) -> None:
    """Remove a file, a link (not what it points to) or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- what is not a tensor of the model


def read_file(path: FilePath, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """What ``torch.save`` wrote, in host memory; without running code from the file, unless ``weights_only=False``.

    Raises:
        ValueError: it holds an object of a type that torch does not load so.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=mmap, weights_only=weights_only)
    except UnpicklingError as error:
        raise ValueError(_unsafe(path, error)) from error
    return content


def read_rest(path: FilePath) -> dict[str, Any]:
    """Everything of a directory but weights and states."""
    return read_file(path / _METADATA_FILENAME)


def _unsafe(what: object, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error))
    return (
        f"{what} holds an object that cannot be loaded safely ({reason}). If you trust the checkpoint, name the type "
        "in torch.serialization.add_safe_globals([..]); or keep such objects out of save_hyperparameters and of the "
        "state_dict of callbacks and data modules"
    )


def _serialised(rest: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(plain_data(rest), buffer)
    try:
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        rank_zero_warn(_unsafe("This checkpoint", error))
    return buffer.getvalue()


def plain_data(value: Any) -> Any:
    """``value`` with paths as strings, NumPy numbers as Python's, attribute dicts as dicts; views get own memory."""
    if isinstance(value, (AttributeDict, dict)) and type(value) in (AttributeDict, dict):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(plain_data, value))
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, GlobalTensor):
        raise TypeError("a hook moved sharded weights to another key of the checkpoint, where they cannot be saved")
    if type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


# --- random states


def random_rows(streams: Mapping[str, Tensor], world: Axis) -> dict[str, GlobalTensor]:
    """Random states as global tensors [world, n], of which this rank holds its row."""
    return {
        name: GlobalTensor((world.size, len(row)), row.dtype, [Part.of((world.rank, 0), row[None])])
        for name, row in streams.items()
    }
