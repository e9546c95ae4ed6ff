"""Objects as bytes that ranks send each other: a tensor that was on a GPU arrives on the receiver's own."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


def to_bytes(value: Any) -> bytes:
    """An object, with all tensors inside it on the CPU."""
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()


def from_bytes(written: bytes, device: torch.device) -> Any:
    """The object again.

    Args:
        written: by :func:`to_bytes`, on another rank of this run.
        device: for tensors that were not on the CPU. As torch pickles them, they would come to the sender's.
    """
    return _Unpickler(io.BytesIO(written), device).load()


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return value.detach().cpu()
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, device: torch.device) -> None:
        super().__init__(file)
        self._device = device

    def persistent_load(self, pid: Any) -> Tensor:
        assert isinstance(pid, Tensor)
        return pid.to(self._device)
