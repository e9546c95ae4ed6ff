"""Autocast for operations of one's own, which it does not know: what it would compute in, and a place without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in here: its own dtype, or that of autocast, which leaves fp64 alone."""
    return torch.get_autocast_dtype(x.device.type) if _is_on(x) and x.dtype != torch.float64 else x.dtype


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Inside, everything on the device of ``x`` is computed in the dtypes it has."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x) else nullcontext()


def _is_on(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
