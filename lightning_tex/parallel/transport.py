"""Collectives of tensors by the cheapest way there is: memory that ranks on one host share, else torch.distributed.

Each takes what torch's does, and gives something with ``wait()`` where it is asked to begin only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.shared_memory import SharedMemory, shared_memory

# torch 2.13 renamed the single-tensor collectives; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Bytes from which on each rank of more than two sums a part, and not all.
_LARGE = 1 << 16
_BINARY: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class Started(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when its result may be used."""


class Done:
    """One that has ended."""

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class _Sent:
    """What this rank gives has been sent.

    Args:
        number: of the message.
        take: reads what others sent.
    """

    memory: SharedMemory
    number: int
    take: Callable[[int], object]

    def wait(self) -> None:
        self.take(self.number)
        self.memory.finished(self.number)

    def __del__(self) -> None:  # of a step that was given up: nobody will wait
        self.memory.finished(self.number)


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, op: str = "sum", async_op: bool = False) -> Any:
    """The sum (or ``max``, ``min``) over the group into ``x``, to the same bits on all ranks."""
    memory = _memory(x, group)
    if memory is None:
        return dist.all_reduce(x, op=getattr(dist.ReduceOp, op.upper()), group=group, async_op=async_op)
    combine = _BINARY[op]
    if not async_op and memory.size > 2 and x.nbytes >= _LARGE:
        _in_parts(x, memory, combine)
        return None
    target = x.data

    def take(number: int) -> None:
        parts = [x.data if rank == memory.rank else _from(memory, number, rank, x) for rank in range(memory.size)]
        if len(parts) == 2:
            combine(*parts, out=target)
            return
        total = parts[0].clone()
        for part in parts[1:]:
            combine(total, part, out=total)
        target.copy_(total)

    return _ended(_Sent(memory, memory.send([x] * memory.size), take), async_op)


def _in_parts(x: Tensor, memory: SharedMemory, combine: Callable[..., Tensor]) -> None:
    """Each rank sums a part, and all take that from it."""
    flat = x.data.view(-1) if x.is_contiguous() else x.data.reshape(-1)
    parts = flat.tensor_split(memory.size)
    own = parts[memory.rank]
    number = memory.send(parts)
    terms = [own if rank == memory.rank else _from(memory, number, rank, own) for rank in range(memory.size)]
    total = combine(terms[0], terms[1])
    for term in terms[2:]:
        combine(total, term, out=total)
    memory.finished(number)
    number = memory.send([total] * memory.size)
    for rank, part in enumerate(parts):
        part.copy_(total if rank == memory.rank else _from(memory, number, rank, part))
    memory.finished(number)
    if not x.is_contiguous():
        x.data.copy_(flat.view(x.shape))


def all_gather_single(out: Tensor, x: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Every rank's ``x``, one behind the other, into ``out``, a part of which ``x`` may be."""
    memory = _memory(x, group)
    if memory is None:
        return _all_gather(out, x, group=group, async_op=async_op)
    parts = out.data.view(memory.size, *x.shape)

    def take(number: int) -> None:
        for rank, part in enumerate(parts):
            if rank != memory.rank:
                part.copy_(_from(memory, number, rank, part))
            elif part.data_ptr() != x.data_ptr():
                part.copy_(x.detach())

    return _ended(_Sent(memory, memory.send([x] * memory.size), take), async_op)


def reduce_scatter_single(out: Tensor, x: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """The sum over the group of this rank's equal part of ``x`` into ``out``, which may be that part."""
    memory = _memory(x, group)
    if memory is None:
        return _reduce_scatter_by_torch(out, x, group, async_op)
    parts = x.data.view(memory.size, *out.shape)

    def take(number: int) -> None:
        own, *others = (parts[memory.rank], *(_from(memory, number, r, out) for r in memory.others))
        torch.add(own, others[0], out=out.data)
        for other in others[1:]:
            out.data.add_(other)

    return _ended(_Sent(memory, memory.send(parts.unbind()), take), async_op)


def _reduce_scatter_by_torch(out: Tensor, x: Tensor, group: dist.ProcessGroup | None, async_op: bool) -> Any:
    """Torch's own, or what costs less of the same."""
    if device_type(x) != "cpu":
        return _reduce_scatter(out, x, group=group, async_op=async_op)
    # Gloo's own is an all-reduce on the wire: twice the bytes and three times the CPU of this.
    parts = torch.empty_like(x)
    under_way = dist.all_to_all_single(parts, x, group=group, async_op=async_op)
    summing = _SummedOnArrival(under_way or Done(), parts.unflatten(0, (dist.get_world_size(group), -1)), out)
    return summing if async_op else summing.wait()


@dataclass(frozen=True)
class _SummedOnArrival:
    """A reduce-scatter whose parts are under way; this rank adds them up itself."""

    exchange: Started
    parts: Tensor
    out: Tensor

    def wait(self) -> None:
        self.exchange.wait()
        torch.sum(self.parts, 0, out=self.out)


def all_to_all_single(
    out: Tensor,
    x: Tensor,
    received: Sequence[int] | None,
    sent: Sequence[int] | None,
    group: dist.ProcessGroup | None,
    async_op: bool = False,
) -> Any:
    """Part i of ``x`` to rank i; what comes into ``out``. The sizes are rows, ``None`` where all are equal."""
    memory = _memory(x, group)
    if memory is None:
        return dist.all_to_all_single(
            out,
            x.contiguous(),
            None if received is None else list(received),
            None if sent is None else list(sent),
            group=group,
            async_op=async_op,
        )

    def parts(of: Tensor, rows: Sequence[int] | None) -> Sequence[Tensor]:
        return of.data.split([len(of) // memory.size] * memory.size if rows is None else list(rows))

    leaving, places = parts(x, sent), parts(out, received)

    def take(number: int) -> None:
        for rank, place in enumerate(places):
            place.copy_(leaving[rank] if rank == memory.rank else _from(memory, number, rank, place))

    return _ended(_Sent(memory, memory.send(leaving), take), async_op)


def _memory(x: Tensor, group: dist.ProcessGroup | None) -> SharedMemory | None:
    return shared_memory(group) if x.device.type == "cpu" else None


def _from(memory: SharedMemory, number: int, rank: int, like: Tensor) -> Tensor:
    return memory.received(number, rank, like.shape, like.dtype)


def _ended(sent: _Sent, async_op: bool) -> _Sent | None:
    if not async_op:
        sent.wait()
        return None
    return sent
