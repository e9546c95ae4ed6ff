"""Whether a GPU's or a CPU's code path is taken where they differ: the one room where a trace may pretend a device.

What differs by device asks :func:`device_type`, never ``tensor.device``. Only traces (``planner``, ``planner_trace``)
pretend one, for as long as they last; in a training the answer is where the tensor lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

_pretended: ContextVar[str | None] = ContextVar("_pretended", default=None)


def device_type(tensor: Tensor) -> str:
    """``"cpu"`` or ``"cuda"``: the type of the device that a tensor lies on, or that is pretended."""
    return _pretended.get() or tensor.device.type


@contextmanager
def pretend_device(kind: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Inside, every tensor is taken to lie on a device of this type, which need not be there."""
    token = _pretended.set(kind)
    try:
        yield
    finally:
        _pretended.reset(token)
