"""Rows to the experts and back. Each direction is the other's backward, so each is written once.

Communication-aware checkpointing (paper section 5.2) acts here: a whole direction, from its first collective to its
last, is one replayable operation. The tape of a recomputed block keeps what came out at its end, and nothing between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import Order, invert, pick, sum_picked
from lightning_tex.parallel.collectives import all_gather, all_to_all
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import replayable

# t own tokens, k choices per token, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# c = C/split, D width, n rows sent, m rows that come back, N rows at the experts


@dataclass(frozen=True)
class Exchange(ABC):
    """The exchange of one forward: linear maps without autograd, decided by the routing.

    Args:
        axes: the axes that rows pass.
        groups: how the N rows lie at the experts.
        choice: [n] the choice t * k + i that is sent as each row; t * k where the row is empty.
        gaps: whether a row may be empty.
        slot: [t, k] where the row of each choice lies when it is back; m where it is not served.
        unserved: whether a choice may be not served.
    """

    axes: ExpertAxes
    groups: Groups
    choice: Tensor
    gaps: bool
    slot: Tensor
    unserved: bool

    @property
    def communicates(self) -> bool:
        """Whether anything passes between ranks."""
        return True

    @abstractmethod
    def send(self, rows: Tensor) -> Tensor:
        """[n, D] rows of this rank to the experts: [N, D], grouped by expert."""

    @abstractmethod
    def bring(self, rows: Tensor) -> Tensor:
        """Partial sums at the experts [N, D] back: [m, D]."""

    def to_experts(self, x: Tensor) -> Tensor:
        """[t, D] tokens to the experts of their choices: [N, D]."""
        return self.send(pick(x, self.choice // self.slot.shape[1], self.gaps))

    def from_experts(self, y: Tensor) -> Tensor:
        """From partial sums at the experts [N, D], the sum over each token's choices: [t, D]. The transpose."""
        return sum_picked(self.bring(y), self.slot, self.unserved)

    def choices_to_experts(self, weights: Tensor) -> Tensor:
        """[t, k] numbers, one of each choice, to its row: [N]; 0 where the row is empty."""
        return self.send(pick(weights.reshape(-1, 1), self.choice, self.gaps)).squeeze(1)

    def choices_from_experts(self, partial: Tensor) -> Tensor:
        """The transpose: [N] -> [t, k]; 0 where a choice was not served."""
        return pick(self.bring(partial[:, None]), self.slot.flatten(), self.unserved).view(self.slot.shape)


@dataclass(frozen=True)
class LocalExchange(Exchange):
    """All experts are here: rows are picked and do not travel. What parts of experts give is summed over ranks."""

    @classmethod
    def of(cls, axes: ExpertAxes, indices: Tensor, order: Order) -> LocalExchange:
        """From the own choices [t, k], grouped."""
        if device_type(indices) != "cpu":
            served = ServedAsFarAsKnown.of(indices, order)
            return cls(axes, Groups(indices.numel(), served.ends), served.choice, True, served.slot, False)
        n = int(order.starts[-1])
        slot = invert(order.sorted).view(indices.shape)
        return cls(
            axes, Groups(n, order.starts[1:].int()), order.sorted[:n], False, slot.clamp(max=n), n < slot.numel()
        )

    @property
    def communicates(self) -> bool:
        return self.axes.shard.size > 1

    def send(self, rows: Tensor) -> Tensor:
        return rows

    def bring(self, rows: Tensor) -> Tensor:
        return self.axes.sum_own(rows)


@dataclass(frozen=True)
class CapacityExchange(Exchange):
    """By buffers of equal shape.

    Args:
        experts: E.
    """

    experts: int

    def send(self, rows: Tensor) -> Tensor:
        buffer = rows.view(self.experts, -1, rows.shape[1])  # [E, c, D]
        by_sender = all_gather(all_to_all(buffer, self.axes.expert), 0, self.axes.gather)  # [senders * e, c, D]
        return by_sender.unflatten(0, (self._senders, -1)).transpose(0, 1).flatten(0, 2)

    def bring(self, rows: Tensor) -> Tensor:
        here = self.experts // self.axes.expert.size
        by_sender = rows.view(here, self._senders, -1, rows.shape[-1]).transpose(0, 1).flatten(0, 1)
        buffer = all_to_all(self.axes.sum_own(by_sender), self.axes.expert)  # [E, c, D]
        return all_gather(buffer, 1, self.axes.split).flatten(0, 1)

    @property
    def _senders(self) -> int:
        return self.axes.gather.size * self.axes.expert.size


@dataclass(frozen=True)
class DroplessExchange(Exchange):
    """As many rows as there are.

    Args:
        sent, received: rows sent to and received from each rank of the expert axis.
        gathered: rows each rank of the gather axis received; N is their sum.
        by_expert: [N] order of the arrived rows at the experts; ``None``: as they arrive.
        by_sender: [N] its inverse.
    """

    sent: list[int]
    received: list[int]
    gathered: list[int]
    by_expert: Tensor | None
    by_sender: Tensor | None

    @classmethod
    def of(
        cls, axes: ExpertAxes, choice: Tensor, slot: Tensor, sent: list[int], received: list[int], gathered: list[int],
        sizes: list[int] | None, by_sender: Tensor, gaps: bool = False,
    ) -> DroplessExchange:  # fmt: skip
        """From what is sent and what arrives.

        Args:
            slot: [t, k] the row of each choice; n or more where it is not sent.
            sizes: rows of each expert here, where the host knows them.
            by_sender: [senders, e] rows of each sender for each of them.
            gaps: whether rows may be empty.
        """
        n, total = sum(sent), sum(gathered)
        groups = Groups(total, by_sender.sum(0).cumsum(0).int(), sizes)
        unserved = n < slot.numel()
        slot = slot.clamp(max=n) if unserved else slot
        regrouped = _regrouped(by_sender, total)
        return cls(axes, groups, choice, gaps, slot, unserved, sent, received, gathered, *regrouped)

    def send(self, rows: Tensor) -> Tensor:
        received = all_to_all(rows, self.axes.expert, self.received, self.sent)
        arrived = all_gather(received, 0, self.axes.gather, self.gathered)
        return arrived if self.by_expert is None else arrived.index_select(0, self.by_expert)

    def bring(self, rows: Tensor) -> Tensor:
        by_sender = rows if self.by_sender is None else rows.index_select(0, self.by_sender)
        return all_to_all(self.axes.sum_own(by_sender, self.gathered), self.axes.expert, self.sent, self.received)


def _regrouped(counts: Tensor, total: int) -> tuple[Tensor | None, Tensor | None]:
    """From rows that lie by sender and expert to rows by expert and sender, and back: two orders of [N].

    Args:
        counts: [senders, e] rows of each sender for each expert.
        total: N, their sum.

    Returns:
        ``None`` where both are the same.
    """
    if 1 in counts.shape:
        return None, None
    by_expert = counts.t()
    before = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)  # place of each block by sender
    after = (by_expert.flatten().cumsum(0) - by_expert.flatten()).view(by_expert.shape)  # and by expert
    place = torch.arange(total, device=counts.device)
    forth = place + (before.t() - after).flatten().repeat_interleave(by_expert.flatten(), output_size=total)
    back = place + (after.t() - before).flatten().repeat_interleave(counts.flatten(), output_size=total)
    return forth, back


class ServedAsFarAsKnown(NamedTuple):
    """All choices as served, so that the host need not wait to know how many there are.

    Those that are masked are empty rows at the end of the last expert's group: no row lies behind its end.

    choice: [t * k] choice of each row; t * k where it is empty.
    ends:   [E] int32, the place behind each expert's last row.
    slot:   [t, k] row of each choice.
    """

    choice: Tensor
    ends: Tensor
    slot: Tensor

    @classmethod
    def of(cls, indices: Tensor, order: Order) -> ServedAsFarAsKnown:
        """From choices [t, k], grouped."""
        return cls(*_masked_as_empty(order.sorted, order.starts), invert(order.sorted).view(indices.shape))


@dataclass(frozen=True)
class ExchangeInRounds(DroplessExchange):
    """All rows, as they would be sent at once, and the same in rounds.

    Args:
        rounds: exchanges of a part of the choices each.
    """

    rounds: list[DroplessExchange]


@leaf
def _masked_as_empty(choices: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    total = choices.shape[0]
    choice = torch.where(torch.arange(total, device=choices.device) < starts[-1], choices, total)
    ends = starts[1:].to(torch.int32)
    ends[-1:] = total
    return choice, ends


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], moves: bool
    ) -> Tensor:
        ctx.back, ctx.layer = back, TRAINING.layer
        return replayable(name, x, lambda: there(x)) if moves else there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        TRAINING.layer = ctx.layer
        return ctx.back(grad), None, None, None, None


def to_experts(x: Tensor, exchange: Exchange) -> Tensor:
    """[t, D] tokens to the experts of their choices: [N, D]. Backward: from the experts."""
    return _Direction.apply(x, "exchange to experts", exchange.to_experts, exchange.from_experts, exchange.communicates)


def from_experts(y: Tensor, exchange: Exchange) -> Tensor:
    """[N, D] partial sums at the experts back, summed over each token's choices: [t, D]. Backward: to the experts."""
    return _Direction.apply(
        y, "exchange from experts", exchange.from_experts, exchange.to_experts, exchange.communicates
    )


def weights_to_experts(weights: Tensor, exchange: Exchange) -> Tensor:
    """[t, k] weights of the choices to their rows: [N]. Backward: back."""
    there, back = exchange.choices_to_experts, exchange.choices_from_experts
    return _Direction.apply(weights, "exchange of weights", there, back, exchange.communicates)
