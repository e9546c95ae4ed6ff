"""Floor 1: collectives that autograd knows, each over an explicit axis.

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

from lightning_tex.topology import Axis

# torch 2.13 renamed the single-tensor collectives; 2.11 has only the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# --- plain collectives: no autograd, new output unless said otherwise


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Sum (or ``op``: ``max``, ``min``) of ``x`` over the axis. Any shape; a new tensor."""
    if axis.size == 1:
        return x
    x = x.contiguous().clone()
    dist.all_reduce(x, op=getattr(dist.ReduceOp, op.upper()), group=axis.group)
    return x


def broadcast(x: Tensor, axis: Axis) -> Tensor:
    """``x`` of the axis's rank 0, on every rank. In place where ``x`` is contiguous."""
    if axis.size == 1:
        return x
    x = x.contiguous()
    dist.broadcast(x, src=axis.ranks[0], group=axis.group)
    return x


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """``x`` of every rank concatenated along ``dim``: [.., n, ..] -> [.., n * size, ..]. Equal shapes."""
    if axis.size == 1:
        return x
    moved = x.movedim(dim, 0).contiguous()
    out = moved.new_empty((moved.shape[0] * axis.size, *moved.shape[1:]))
    _all_gather_single(out, moved, group=axis.group)
    return out.movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's equal part along ``dim`` of the sum over the axis: [.., n, ..] -> [.., n / size, ..]."""
    if axis.size == 1:
        return x
    moved = x.movedim(dim, 0).contiguous()
    out = moved.new_empty((moved.shape[0] // axis.size, *moved.shape[1:]))
    _reduce_scatter_single(out, moved, group=axis.group)
    return out.movedim(0, dim)


def all_to_all(
    x: Tensor, axis: Axis, arrive: Sequence[int] | None = None, leave: Sequence[int] | None = None
) -> Tensor:
    """Rows to their rank: the first dim is cut into ``size`` parts, part i goes to rank i. [n, ..] -> [m, ..].

    Args:
        arrive: rows received from each rank; ``None`` with ``leave=None`` for equal parts.
        leave: rows sent to each rank.
    """
    if axis.size == 1:
        return x
    rows = x.shape[0] if arrive is None else sum(arrive)
    out = x.new_empty((rows, *x.shape[1:]))
    to = None if arrive is None else list(arrive)
    dist.all_to_all_single(out, x.contiguous(), to, None if leave is None else list(leave), group=axis.group)
    return out


def gather_in_place(buffer: Tensor, axis: Axis) -> None:
    """Fill a flat buffer from the ranks' own equal parts of it, each already in its place."""
    if axis.size > 1:
        _all_gather_single(buffer, own_part(buffer, axis), group=axis.group)


def reduce_scatter_in_place(buffer: Tensor, axis: Axis) -> None:
    """Sum a flat buffer over the axis into this rank's own equal part of it; the other parts are left undefined."""
    if axis.size > 1:
        _reduce_scatter_single(own_part(buffer, axis), buffer, group=axis.group)


def own_part(buffer: Tensor, axis: Axis) -> Tensor:
    """This rank's equal part of a flat buffer, as a view."""
    length = buffer.numel() // axis.size
    return buffer[axis.rank * length : (axis.rank + 1) * length]


# --- collectives with a backward


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.dim, ctx.sizes, ctx.axis = dim, sizes, axis
        return _gather_uneven(x, dim, sizes, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.split(ctx.sizes, ctx.dim)[ctx.axis.rank].contiguous(), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.dim, ctx.sizes, ctx.axis = dim, sizes, axis
        return x.split(sizes, dim)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather_uneven(grad, ctx.dim, ctx.sizes, ctx.axis), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, arrive: Sequence[int] | None, leave: Sequence[int] | None) -> Tensor:
        ctx.axis, ctx.arrive, ctx.leave = axis, arrive, leave
        return all_to_all(x, axis, arrive, leave)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grad, ctx.axis, ctx.leave, ctx.arrive), None, None, None


def enter(x: Tensor, axis: Axis) -> Tensor:
    """Into a region whose ranks each compute a part. Identity forward, all-reduce backward."""
    return x if axis.size == 1 else _Enter.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Out of a region whose ranks each hold a partial sum. All-reduce forward, identity backward."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


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
    if axis.size == 1:
        return x
    return _Gather.apply(x, dim, tuple(sizes or [x.shape[dim]] * axis.size), axis)


def split(x: Tensor, dim: int, axis: Axis, sizes: Sequence[int] | None = None) -> Tensor:
    """Whole to own part, for a whole that all ranks hold alike. Split forward, all-gather backward.

    Args:
        sizes: each rank's extent along ``dim`` where they are not equal.
    """
    if axis.size == 1:
        return x
    if sizes is None:
        assert x.shape[dim] % axis.size == 0
        sizes = [x.shape[dim] // axis.size] * axis.size
    return _Split.apply(x, dim, tuple(sizes), axis)


def exchange(x: Tensor, axis: Axis, arrive: Sequence[int] | None = None, leave: Sequence[int] | None = None) -> Tensor:
    """Rows to their rank (see :func:`all_to_all`). All-to-all forward, the reverse all-to-all backward."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, arrive, leave)


def _gather_uneven(x: Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> Tensor:
    longest = max(sizes)
    if min(sizes) == longest:
        return all_gather(x, dim, axis)
    # Gloo has no uneven all-gather: pad to the longest, cut the padding out afterwards.
    moved = x.movedim(dim, 0)
    padding = [0, 0] * (moved.dim() - 1) + [0, longest - moved.shape[0]]
    parts = all_gather(F.pad(moved, padding), 0, axis).split(longest)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).movedim(0, dim)
