"""Collectives that autograd knows, each over an explicit axis.

Every function is the identity, or a plain copy-free view, on an axis of size 1, so callers never ask. Each docstring
gives both directions. All of them are called by every rank of the axis, whatever its sizes, zero included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.parallel import transport
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import count_sent, replayable
from lightning_tex.parallel.topology import Axis

# --- plain collectives: no autograd, new output unless said otherwise


def all_reduce(x: Tensor, axis: Axis, op: str = "sum", operation: str = "all_reduce") -> Tensor:
    """Sum (or ``op``: ``max``, ``min``) of ``x`` over the axis. Any shape; a new tensor.

    Here and below, ``operation`` is the name it is counted under.
    """
    if axis.size == 1:
        return x

    def run() -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        _sum(out, axis, op, operation)
        return out

    return replayable(f"{operation} over {axis.name}", x, run)


def all_reduce_(x: Tensor, axis: Axis) -> Tensor:
    """Sum of ``x``, which becomes it, over the axis. On a tape the result may be another tensor."""
    if axis.size == 1:
        return x

    def run() -> Tensor:
        out = x.contiguous()
        _sum(out, axis, "sum", "all_reduce")
        return out

    return replayable(f"all_reduce over {axis.name}", x, run)


def _sum(x: Tensor, axis: Axis, op: str, operation: str) -> None:
    TRAINING.enter("all_reduce", axis, x)
    transport.all_reduce(x, axis.group, op)
    TRAINING.leave()
    count_sent(operation, axis, 2 * (axis.size - 1) * x.nbytes)


def broadcast(x: Tensor, axis: Axis) -> Tensor:
    """``x`` of the axis's rank 0, on every rank; a new tensor."""
    if axis.size == 1:
        return x

    def run() -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        TRAINING.enter("broadcast", axis, x)
        dist.broadcast(out, src=axis.ranks[0], group=axis.group)
        TRAINING.leave()
        count_sent("broadcast", axis, (axis.size - 1) * x.nbytes)
        return out

    return replayable(f"broadcast over {axis.name}", x, run)


def all_gather(
    x: Tensor, dim: int, axis: Axis, sizes: Sequence[int] | None = None, operation: str = "all_gather"
) -> Tensor:
    """``x`` of every rank concatenated along ``dim``: [.., n, ..] -> [.., sum of n, ..].

    Args:
        sizes: each rank's extent along ``dim`` where they are not equal.
    """
    if axis.size == 1:
        return x

    def run() -> Tensor:
        along = dim % x.dim()
        padded = (x if sizes is None else _padded(x, along, max(sizes))).contiguous()
        parts = padded.new_empty((axis.size, *padded.shape))
        TRAINING.enter("all_gather", axis, padded)
        transport.all_gather_single(parts.flatten(0, 1), padded, axis.group)
        TRAINING.leave()
        count_sent(operation, axis, (axis.size - 1) * parts.nbytes)
        if sizes is not None and min(sizes) < max(sizes):
            return torch.cat([part.narrow(along, 0, n) for part, n in zip(parts, sizes, strict=True)], along)
        return parts.movedim(0, along).flatten(along, along + 1)

    return replayable(f"{operation} over {axis.name}", x, run)


def reduce_scatter(x: Tensor, dim: int, axis: Axis, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part along ``dim`` of the sum over the axis: [.., sum of n, ..] -> [.., n, ..].

    Args:
        sizes: each rank's extent along ``dim`` where they are not equal.
    """
    if axis.size == 1:
        return x

    def run() -> Tensor:
        along = dim % x.dim()
        if sizes is not None and min(sizes) < max(sizes):
            parts = torch.stack([_padded(part, along, max(sizes)) for part in x.split(list(sizes), along)])
        else:
            parts = x.unflatten(along, (axis.size, x.shape[along] // axis.size)).movedim(along, 0).contiguous()
        out = parts.new_empty(parts.shape[1:])
        TRAINING.enter("reduce_scatter", axis, parts)
        transport.reduce_scatter_single(out, parts.flatten(0, 1), axis.group)
        TRAINING.leave()
        count_sent("reduce_scatter", axis, (axis.size - 1) * parts.nbytes)
        return out if sizes is None else out.narrow(along, 0, sizes[axis.rank])

    return replayable(f"reduce_scatter over {axis.name}", x, run)


def own_slice(x: Tensor, dim: int, axis: Axis, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part of ``x`` along ``dim``, a view; equal parts unless ``sizes`` says otherwise."""
    parts = [x.shape[dim] // axis.size] * axis.size if sizes is None else list(sizes)
    return x.narrow(dim, sum(parts[: axis.rank]), parts[axis.rank])


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    # Gloo and NCCL have no uneven all-gather: pad to the longest, trim the padding afterwards.
    return x if x.shape[dim] == length else F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, length - x.shape[dim]])


# --- collectives with a backward


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.layer = TRAINING.layer
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        TRAINING.layer = ctx.layer
        return all_reduce(grad, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        # Not marked as changed: nobody else has x, and a tape would take the mark for a change of what it has recorded.
        return all_reduce_(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.size = axis.size
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


class _EnterSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.layer = TRAINING.layer
        ctx.arguments = dim, axis
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        TRAINING.layer = ctx.layer
        return reduce_scatter(grad, *ctx.arguments), None, None


class _ReduceSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.layer = TRAINING.layer
        ctx.arguments = dim, axis
        return reduce_scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        TRAINING.layer = ctx.layer
        return all_gather(grad, *ctx.arguments), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...] | None, axis: Axis) -> Tensor:
        ctx.arguments = dim, axis, sizes
        return all_gather(x, dim, axis, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return own_slice(grad, *ctx.arguments).contiguous(), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...] | None, axis: Axis) -> Tensor:
        ctx.layer = TRAINING.layer
        ctx.arguments = dim, axis, sizes
        return own_slice(x, dim, axis, sizes).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        TRAINING.layer = ctx.layer
        return all_gather(grad, *ctx.arguments), None, None, None


# Nodes of an autograd graph at which gradients come out of, or go into, what an axis's ranks hold parts of.
BORDERS = tuple(function._backward_cls for function in (_EnterSplit, _ReduceSplit, _Reduce, _ReduceInPlace))


def enter(x: Tensor, axis: Axis) -> Tensor:
    """Into a region whose ranks each compute a part. Identity forward, all-reduce backward."""
    return x if axis.size == 1 else _Enter.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Out of a region whose ranks each hold a partial sum. All-reduce forward, identity backward."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def reduce_(x: Tensor, axis: Axis) -> Tensor:
    """:func:`reduce` of a partial sum that nobody else has, in its place."""
    return x if axis.size == 1 else _ReduceInPlace.apply(x, axis)


def enter_split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Own part to whole, into a region whose ranks each compute a part. All-gather forward, reduce-scatter backward."""
    return x if axis.size == 1 else _EnterSplit.apply(x, dim, axis)


def reduce_split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Partial sums of the whole to own part of the sum. Reduce-scatter forward, all-gather backward."""
    return x if axis.size == 1 else _ReduceSplit.apply(x, dim, axis)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """A sum that every rank of the axis uses in its own, equal loss term.

    All-reduce forward. Backward multiplies by the axis size: what an all-reduce of the ranks' equal gradients would
    give, without the bytes. Gradients that are later averaged over the axis come out exactly once.
    """
    return x if axis.size == 1 else _SumOver.apply(x, axis)


def gather(x: Tensor, dim: int, axis: Axis, sizes: Sequence[int] | None = None) -> Tensor:
    """Parts to whole, for a whole that all ranks then treat alike. All-gather forward, split backward.

    Args:
        sizes: each rank's extent along ``dim`` where they are not equal.
    """
    return x if axis.size == 1 else _Gather.apply(x, dim, _even(sizes), axis)


def split(x: Tensor, dim: int, axis: Axis, sizes: Sequence[int] | None = None) -> Tensor:
    """Whole to own part, for a whole that all ranks hold alike. Split forward, all-gather backward.

    Args:
        sizes: each rank's extent along ``dim`` where they are not equal.
    """
    if axis.size == 1:
        return x
    assert sizes is not None or x.shape[dim] % axis.size == 0
    return _Split.apply(x, dim, _even(sizes), axis)


def _even(sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else tuple(sizes)
