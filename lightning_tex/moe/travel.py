"""How rows travel to the experts and home. Each way is the other's backward, so each is written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tex.collectives import all_gather, all_reduce, all_to_all, own_slice, reduce_scatter
from lightning_tex.recording import recorded
from lightning_tex.topology import Axis

# E experts, e experts held here, P = E/e ranks on the expert axis, C capacity, c = C/split, D model width,
# n rows sent, N rows at the experts


@dataclass(frozen=True)
class Lanes:
    """The axes of the way.

    Args:
        expert: the axis the experts are spread over; tokens travel over it by all-to-all.
        split: the axis equal tokens are split over before they travel; size 1 where they are not.
        gather: the axis arrived tokens are put together over; size 1 where they are not.
        cut: the axis an expert's matrices are cut over: what experts give are partial sums over it.
        fused: sum and split in one reduce-scatter, not an all-reduce and a split as in the paper.
    """

    expert: Axis
    split: Axis
    gather: Axis
    cut: Axis
    fused: bool = True

    def sum_own(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Of partial sums over ``cut``, the sum; of that, the part along ``dim`` that ``gather`` put in here."""
        if self.gather.size == 1:
            return all_reduce(x, self.cut)
        if self.fused:
            return reduce_scatter(x, dim, self.gather, sizes)
        return own_slice(all_reduce(x, self.gather), dim, self.gather, sizes)


class Way(ABC):
    """The way of one forward: linear maps without autograd, each the other's transpose."""

    @abstractmethod
    def out(self, x: Tensor) -> Tensor:
        """To the experts."""

    @abstractmethod
    def home(self, y: Tensor) -> Tensor:
        """From partial sums at the experts home."""


@dataclass(frozen=True)
class CapacityWay(Way):
    """[E, C, D] buffers of equal shape: out to [e, P, c * gather, D], home to [E, C, D]."""

    lanes: Lanes

    def out(self, x: Tensor) -> Tensor:
        part = all_to_all(own_slice(x, 1, self.lanes.split), self.lanes.expert)  # [P * e, c, D]
        by_expert = part.unflatten(0, (self.lanes.expert.size, -1)).transpose(0, 1)
        return all_gather(by_expert, 2, self.lanes.gather)

    def home(self, y: Tensor) -> Tensor:
        part = self.lanes.sum_own(y, 2).transpose(0, 1).flatten(0, 1)  # [P * e, c, D]
        return all_gather(all_to_all(part, self.lanes.expert), 1, self.lanes.split)


@dataclass(frozen=True)
class DroplessWay(Way):
    """[n, D] rows by expert: out to [N, D] rows by sender, home to [n, D].

    Args:
        lanes: the axes.
        leave, arrive: rows sent to and received from each rank of the expert axis.
        gathered: rows each rank of the gather axis received; N is their sum.
    """

    lanes: Lanes
    leave: list[int]
    arrive: list[int]
    gathered: list[int]

    def out(self, x: Tensor) -> Tensor:
        part = all_to_all(x, self.lanes.expert, self.arrive, self.leave)
        return all_gather(part, 0, self.lanes.gather, self.gathered)

    def home(self, y: Tensor) -> Tensor:
        part = self.lanes.sum_own(y, 0, self.gathered)
        return all_to_all(part, self.lanes.expert, self.leave, self.arrive)


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return recorded("the way out", x, lambda: way.out(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.home(grad), None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return recorded("the way home", y, lambda: way.home(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.out(grad), None


def send(x: Tensor, way: Way) -> Tensor:
    """Rows to the experts. ``way.out`` forward, ``way.home`` backward; recomputation replays only what arrived."""
    return _Out.apply(x, way)


def bring(y: Tensor, way: Way) -> Tensor:
    """Partial sums at the experts home. ``way.home`` forward, ``way.out`` backward."""
    return _Home.apply(y, way)
