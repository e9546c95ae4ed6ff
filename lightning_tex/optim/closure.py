"""The closure that an optimizer's step may be given: the loss, computed once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure gives, with gradients where the step itself computes none; ``None`` without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
