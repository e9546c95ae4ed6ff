"""Collectives of flat buffers in place, begun now and waited for later: what the optimizer needs. No autograd.

Each does nothing on an axis of size 1, and is called by every rank of the axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import count_sent
from lightning_tex.parallel.topology import Axis

# torch 2.13 renamed the single-tensor collectives; 2.11 has only the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Started(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when its result may be used."""


class _Done:
    def wait(self) -> None:
        pass


_DONE = _Done()


class _SummedOnArrival(NamedTuple):
    """A reduce-scatter whose parts are under way; this rank adds them up itself."""

    exchange: Started
    parts: Tensor
    out: Tensor

    def wait(self) -> None:
        self.exchange.wait()
        torch.sum(self.parts, 0, out=self.out)


class _Recorded(NamedTuple):
    """A collective whose waiting is in the flight record."""

    under_way: Started
    entry: tuple[Any, ...]

    def wait(self) -> None:
        TRAINING.wait(self.entry)
        self.under_way.wait()
        TRAINING.leave()


def reduce_scatter_single(out: Tensor, x: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Torch's own, or what costs less of the same."""
    if device_type(x) != "cpu":
        return _native_reduce_scatter(out, x, group=group, async_op=async_op)
    # Gloo's own is an all-reduce on the wire: twice the bytes and three times the CPU of this.
    parts = torch.empty_like(x)
    under_way = dist.all_to_all_single(parts, x, group=group, async_op=async_op)
    summing = _SummedOnArrival(under_way or _DONE, parts.unflatten(0, (dist.get_world_size(group), -1)), out)
    return summing if async_op else summing.wait()


def gather_in_place(buffer: Tensor, axis: Axis) -> Started:
    """Fill a flat buffer from the ranks' own equal parts of it, each already in its place; done after ``wait()``."""
    if axis.size == 1:
        return _DONE
    count_sent("all_gather", axis, (axis.size - 1) * buffer.nbytes)
    part = own_part(buffer, axis)
    entry = TRAINING.begin("all_gather", axis, part)
    return _Recorded(all_gather_single(buffer, part, group=axis.group, async_op=True), entry)


def reduce_scatter_in_place(buffer: Tensor, axis: Axis) -> Started:
    """Sum a flat buffer over the axis into this rank's own equal part of it, done after ``wait()``.

    The other parts are left undefined.
    """
    if axis.size == 1:
        return _DONE
    count_sent("reduce_scatter", axis, (axis.size - 1) * buffer.nbytes)
    entry = TRAINING.begin("reduce_scatter", axis, buffer)
    return _Recorded(reduce_scatter_single(own_part(buffer, axis), buffer, group=axis.group, async_op=True), entry)


def sum_in_place(x: Tensor, axis: Axis) -> Started:
    """Sum ``x`` over the axis, done after ``wait()``."""
    if axis.size == 1:
        return _DONE
    count_sent("all_reduce", axis, 2 * (axis.size - 1) * x.nbytes)
    entry = TRAINING.begin("all_reduce", axis, x)
    return _Recorded(dist.all_reduce(x, group=axis.group, async_op=True), entry)


def own_part(buffer: Tensor, axis: Axis) -> Tensor:
    """This rank's equal part of a flat buffer, as a view."""
    length = buffer.numel() // axis.size
    return buffer[axis.rank * length : (axis.rank + 1) * length]
