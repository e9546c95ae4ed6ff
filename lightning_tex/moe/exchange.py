"""Rows to the experts and back. Each direction is the other's backward, so each is written once.

Communication-aware checkpointing (paper section 5.2) acts here: a whole direction, from its first collective to its
last, is one replayable operation. The tape of a recomputed block keeps what came out at its end, and nothing between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.permute import pick
from lightning_tex.parallel.collectives import all_gather, all_to_all, own_slice
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import replayable

# t own tokens, k choices per token, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# c = C/split, D model width, n rows sent, N rows at the experts


@dataclass(frozen=True)
class Exchange(ABC):
    """The exchange of one forward: linear maps without autograd.

    Args:
        axes: the axes that rows pass.
        slot: [t, k] where the row of each choice lies when it is back; one more than there are where it is not served.
    """

    axes: ExpertAxes
    slot: Tensor

    @abstractmethod
    def to_experts(self, x: Tensor, choices: int) -> Tensor:
        """Rows at the experts, [N, D] by expert. Row i of ``x`` goes for ``choices`` choices, from i * choices on."""

    @abstractmethod
    def from_experts(self, y: Tensor) -> Tensor:
        """From partial sums at the experts [N, D] back: [t * k, D] by choice, 0 where it was not served.

        The transpose of ``to_experts(x, 1)``.
        """


@dataclass(frozen=True)
class CapacityExchange(Exchange):
    """By buffers of equal shape.

    Args:
        choice: [E, C] the choice t * k + i in each row of the buffer; t * k where it is empty.
    """

    choice: Tensor

    def to_experts(self, x: Tensor, choices: int) -> Tensor:
        # Duplicate-token dropping (paper section 5.1): of rows that tensor ranks hold alike, each sends its own.
        own = own_slice(self.choice, 1, self.axes.split) // choices  # [E, c]
        received = all_to_all(pick(x, own.flatten()).view(*own.shape, x.shape[-1]), self.axes.expert)  # [P * e, c, D]
        by_sender = all_gather(received, 0, self.axes.gather).unflatten(0, (self._senders, -1))
        return by_sender.transpose(0, 1).flatten(0, 2)

    def from_experts(self, y: Tensor) -> Tensor:
        experts, rows = len(self.choice) // self.axes.expert.size, self.choice.shape[1] // self.axes.split.size
        by_sender = y.reshape(experts, self._senders, rows, y.shape[-1]).transpose(0, 1).flatten(0, 1)
        buffer = all_to_all(self.axes.sum_own(by_sender), self.axes.expert)  # [P * e, c, D]
        return pick(all_gather(buffer, 1, self.axes.split).flatten(0, 1), self.slot.flatten())

    @property
    def _senders(self) -> int:
        return self.axes.gather.size * self.axes.expert.size


@dataclass(frozen=True)
class DroplessExchange(Exchange):
    """As many rows as there are.

    Args:
        choice: [n] the choices that are sent, by expert.
        sent, received: rows sent to and received from each rank of the expert axis.
        gathered: rows each rank of the gather axis received; N is their sum.
        by_expert: [N] order of the arrived rows at the experts.
        by_sender: [N] its inverse.
    """

    choice: Tensor
    sent: list[int]
    received: list[int]
    gathered: list[int]
    by_expert: Tensor
    by_sender: Tensor

    def to_experts(self, x: Tensor, choices: int) -> Tensor:
        received = all_to_all(pick(x, self.choice // choices), self.axes.expert, self.received, self.sent)
        return all_gather(received, 0, self.axes.gather, self.gathered).index_select(0, self.by_expert)

    def from_experts(self, y: Tensor) -> Tensor:
        own = self.axes.sum_own(y.index_select(0, self.by_sender), self.gathered)
        return pick(all_to_all(own, self.axes.expert, self.sent, self.received), self.slot.flatten())


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.layer = exchange, TRAINING.layer
        return replayable("exchange to experts", x, lambda: exchange.to_experts(x, exchange.slot.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        TRAINING.layer = ctx.layer
        rows = ctx.exchange.from_experts(grad)
        top_k = ctx.exchange.slot.shape[1]
        return rows if top_k == 1 else rows.unflatten(0, (-1, top_k)).sum(1), None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.layer = exchange, TRAINING.layer
        return replayable("exchange from experts", y, lambda: exchange.from_experts(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        TRAINING.layer = ctx.layer
        return ctx.exchange.to_experts(grad, 1), None


def to_experts(x: Tensor, exchange: Exchange) -> Tensor:
    """[t, D] tokens to the experts of their choices: [N, D]. Backward: from the experts."""
    return _ToExperts.apply(x, exchange)


def from_experts(y: Tensor, exchange: Exchange) -> Tensor:
    """[N, D] partial sums at the experts back: [t * k, D]. Backward: to the experts."""
    return _FromExperts.apply(y, exchange)
