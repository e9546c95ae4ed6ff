"""Collectives of flat buffers in place, begun now and waited for later: what the optimizer needs. No autograd.

Each does nothing on an axis of size 1, and is called by every rank of the axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lightning_tex.parallel import transport
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import count_sent
from lightning_tex.parallel.topology import Axis
from lightning_tex.parallel.transport import Done, Started

_DONE = Done()


class _Recorded(NamedTuple):
    """A collective whose waiting is in the flight record."""

    under_way: Started
    entry: tuple[Any, ...]

    def wait(self) -> None:
        TRAINING.wait(self.entry)
        self.under_way.wait()
        TRAINING.leave()


def gather_in_place(buffer: Tensor, axis: Axis) -> Started:
    """Fill a flat buffer from the ranks' own equal parts of it, each already in its place; done after ``wait()``."""
    if axis.size == 1:
        return _DONE
    count_sent("all_gather", axis, (axis.size - 1) * buffer.nbytes)
    part = own_part(buffer, axis)
    entry = TRAINING.begin("all_gather", axis, part)
    return _Recorded(transport.all_gather_single(buffer, part, axis.group, async_op=True), entry)


def reduce_scatter_in_place(buffer: Tensor, axis: Axis) -> Started:
    """Sum a flat buffer over the axis into this rank's own equal part of it, done after ``wait()``.

    The other parts are left undefined.
    """
    if axis.size == 1:
        return _DONE
    count_sent("reduce_scatter", axis, (axis.size - 1) * buffer.nbytes)
    entry = TRAINING.begin("reduce_scatter", axis, buffer)
    return _Recorded(transport.reduce_scatter_single(own_part(buffer, axis), buffer, axis.group, async_op=True), entry)


def sum_in_place(x: Tensor, axis: Axis) -> Started:
    """Sum ``x`` over the axis, done after ``wait()``."""
    if axis.size == 1:
        return _DONE
    count_sent("all_reduce", axis, 2 * (axis.size - 1) * x.nbytes)
    entry = TRAINING.begin("all_reduce", axis, x)
    return _Recorded(transport.all_reduce(x, axis.group, async_op=True), entry)


def own_part(buffer: Tensor, axis: Axis) -> Tensor:
    """This rank's equal part of a flat buffer, as a view."""
    length = buffer.numel() // axis.size
    return buffer[axis.rank * length : (axis.rank + 1) * length]
