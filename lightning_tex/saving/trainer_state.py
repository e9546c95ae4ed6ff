"""What a checkpoint holds beside tensors of the model: made of plain data, read without running code from the file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import PurePath
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tex.parallel.errors import UserTypeError, UserValueError
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.remote_path import Location, RemotePath

# Lightning's own name for the file, which its consolidate_checkpoint reads.
TRAINER_STATE = _METADATA_FILENAME


def restricted_load(file: Any, what: object, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """What ``torch.save`` wrote, in host memory; nothing from the file is run, unless ``weights_only=False``.

    Args:
        file: a path or an open file.
        what: names it in messages.

    Raises:
        ValueError: it holds an object of a type that torch does not load so, or is no such file.
    """
    # Said explicitly, an environment variable cannot turn it off.
    restricted = weights_only is not False
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=mmap, weights_only=restricted)
    except UnpicklingError as error:
        raise UserValueError(_unsafe(what, error)) from error
    except (RuntimeError, EOFError) as error:
        raise UserValueError(f"{what} cannot be read, it is damaged or no checkpoint: {error}") from error
    return content


def load_file(path: Location, weights_only: bool | None = None) -> dict[str, Any]:
    """A plain checkpoint. On a mounted file system it is mapped, not read: a rank touches only its parts."""
    if isinstance(path, RemotePath):
        return restricted_load(io.BytesIO(path.read_bytes()), path, weights_only)
    return restricted_load(path, path, weights_only, mmap=True)


def serialised(trainer_state: Mapping[str, Any]) -> bytes:
    """The trainer's state as :func:`restricted_load` reads it; warns of what it would refuse."""
    buffer: IO[bytes] = io.BytesIO()
    torch.save(plain_data(trainer_state), buffer)
    content = buffer.getvalue()  # type: ignore[attr-defined]
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        rank_zero_warn(_unsafe("This checkpoint", error))
    return content


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
        raise UserTypeError("a hook moved sharded weights to another key of the checkpoint, where they cannot be saved")
    if type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def _unsafe(what: object, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error))
    return (
        f"{what} holds an object that cannot be loaded safely ({reason}). If you trust the checkpoint, name the type "
        "in torch.serialization.add_safe_globals([..]); or keep such objects out of save_hyperparameters and of the "
        "state_dict of callbacks and data modules"
    )
