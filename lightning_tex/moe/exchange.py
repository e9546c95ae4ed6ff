"""How rows travel to the experts and home. Each way is the other's backward, so each is written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tex.moe.permute import pick
from lightning_tex.parallel.collectives import all_gather, all_reduce, all_to_all, own_slice, reduce_scatter
from lightning_tex.parallel.replay import recorded
from lightning_tex.parallel.topology import Axis

# t own tokens, k choices per token, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# c = C/split, D model width, n rows sent, N rows at the experts


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

    def sum_own(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Of partial sums over ``cut``, the sum; of that, the part along dim 0 that ``gather`` put in here."""
        if self.gather.size == 1:
            return all_reduce(x, self.cut)
        if self.fused:
            return reduce_scatter(x, 0, self.gather, sizes)
        return own_slice(all_reduce(x, self.gather), 0, self.gather, sizes)


@dataclass(frozen=True)
class Way(ABC):
    """The way of one forward: linear maps without autograd.

    Args:
        lanes: the axes.
        slot: [t, k] where the row of each choice lies when it is home; one more than there are where it is not served.
    """

    lanes: Lanes
    slot: Tensor

    @abstractmethod
    def out(self, x: Tensor, each: int) -> Tensor:
        """To the experts, [N, D] grouped by expert. Row i of ``x`` goes for the ``each`` choices from i * each on."""

    @abstractmethod
    def home(self, y: Tensor) -> Tensor:
        """From partial sums at the experts [N, D] home: [t * k, D] by choice, 0 where it was not served.

        The transpose of ``out(x, 1)``.
        """


@dataclass(frozen=True)
class CapacityWay(Way):
    """By buffers of equal shape.

    Args:
        choice: [E, C] the choice t * k + i in each row of the buffer; t * k where it is empty.
    """

    choice: Tensor

    def out(self, x: Tensor, each: int) -> Tensor:
        own = own_slice(self.choice, 1, self.lanes.split) // each  # [E, c]
        part = all_to_all(pick(x, own.flatten()).view(*own.shape, x.shape[-1]), self.lanes.expert)  # [P * e, c, D]
        by_sender = all_gather(part, 0, self.lanes.gather).unflatten(0, (self._senders, -1))
        return by_sender.transpose(0, 1).flatten(0, 2)

    def home(self, y: Tensor) -> Tensor:
        experts, rows = len(self.choice) // self.lanes.expert.size, self.choice.shape[1] // self.lanes.split.size
        by_sender = y.reshape(experts, self._senders, rows, y.shape[-1]).transpose(0, 1).flatten(0, 1)
        buffer = all_to_all(self.lanes.sum_own(by_sender), self.lanes.expert)  # [P * e, c, D]
        return pick(all_gather(buffer, 1, self.lanes.split).flatten(0, 1), self.slot.flatten())

    @property
    def _senders(self) -> int:
        return self.lanes.gather.size * self.lanes.expert.size


@dataclass(frozen=True)
class DroplessWay(Way):
    """As many rows as there are.

    Args:
        choice: [n] the choices that are sent, by expert.
        leave, arrive: rows sent to and received from each rank of the expert axis.
        gathered: rows each rank of the gather axis received; N is their sum.
        by_expert: [N] order of the arrived rows at the experts.
        by_sender: [N] its inverse.
    """

    choice: Tensor
    leave: list[int]
    arrive: list[int]
    gathered: list[int]
    by_expert: Tensor
    by_sender: Tensor

    def out(self, x: Tensor, each: int) -> Tensor:
        part = all_to_all(pick(x, self.choice // each), self.lanes.expert, self.arrive, self.leave)
        return all_gather(part, 0, self.lanes.gather, self.gathered).index_select(0, self.by_expert)

    def home(self, y: Tensor) -> Tensor:
        part = self.lanes.sum_own(y.index_select(0, self.by_sender), self.gathered)
        return pick(all_to_all(part, self.lanes.expert, self.leave, self.arrive), self.slot.flatten())


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return recorded("the way out", x, lambda: way.out(x, way.slot.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = ctx.way.home(grad)
        top_k = ctx.way.slot.shape[1]
        return rows if top_k == 1 else rows.unflatten(0, (-1, top_k)).sum(1), None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return recorded("the way home", y, lambda: way.home(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.out(grad, 1), None


def send(x: Tensor, way: Way) -> Tensor:
    """[t, D] tokens to the experts of their choices: [N, D]. ``way.out`` forward, ``way.home`` backward.

    Recomputation replays only what arrived.
    """
    return _Out.apply(x, way)


def bring(y: Tensor, way: Way) -> Tensor:
    """[N, D] partial sums at the experts home: [t * k, D]. ``way.home`` forward, ``way.out`` backward."""
    return _Home.apply(y, way)
