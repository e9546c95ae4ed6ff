"""Whose ways are taken where CPUs and GPUs differ."""

from __future__ import annotations

from contextvars import ContextVar

from torch import Tensor

# "cpu" or "cuda" inside a trace, which plays a device that need not be there.
played_device: ContextVar[str | None] = ContextVar("played_device", default=None)


def device_type(tensor: Tensor) -> str:
    """The type of the device that a tensor lies on or, in a trace, is taken to lie on."""
    return played_device.get() or tensor.device.type
