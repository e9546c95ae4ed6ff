"""Rows to the experts and back. Each direction is the other's backward, so each is written once.

Each begins with ``start_..`` and ends with ``wait()`` of what that gives: between the two, the all-to-all is under way.
What stays inside a host, over tensor, is done in line: before the way back begins, and when what comes is waited for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import Order, invert, pick, sum_picked
from lightning_tex.parallel.all_to_all import start_all_to_all
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.started import Ready, Then, UnderWay

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
    def rows(self) -> int:
        """N."""
        return self.groups.rows

    @abstractmethod
    def start_send(self, rows: Tensor) -> UnderWay[Tensor]:
        """[n, D] rows of this rank to the experts: [N, D], grouped by expert."""

    @abstractmethod
    def start_bring(self, rows: Tensor) -> UnderWay[Tensor]:
        """Partial sums at the experts [N, D] back: [m, D]. They may be overwritten."""

    def start_to_experts(self, x: Tensor) -> UnderWay[Tensor]:
        """[t, D] tokens to the experts of their choices: [N, D]."""
        return self.start_send(pick(x, self.choice // self.slot.shape[1], self.gaps))

    def start_from_experts(self, y: Tensor) -> UnderWay[Tensor]:
        """From partial sums at the experts [N, D], the sum over each token's choices: [t, D]. The transpose."""
        return Then(self.start_bring(y), lambda rows: sum_picked(rows, self.slot, self.unserved))

    def start_choices_to_experts(self, weights: Tensor) -> UnderWay[Tensor]:
        """[t, k] numbers, one of each choice, to its row: [N]; 0 where the row is empty."""
        return Then(self.start_send(pick(weights.reshape(-1, 1), self.choice, self.gaps)), lambda rows: rows.squeeze(1))

    def start_choices_from_experts(self, partial: Tensor) -> UnderWay[Tensor]:
        """The transpose: [N] -> [t, k]; 0 where a choice was not served."""

        def home(rows: Tensor) -> Tensor:
            return pick(rows, self.slot.flatten(), self.unserved).view(self.slot.shape)

        return Then(self.start_bring(partial[:, None]), home)


@dataclass(frozen=True)
class LocalExchange(Exchange):
    """All experts are here: rows are picked and do not travel. What parts of experts give is summed over ranks."""

    @classmethod
    def of(cls, axes: ExpertAxes, indices: Tensor, order: Order, known: bool | None = None) -> LocalExchange:
        """From the own choices [t, k], grouped.

        Args:
            known: the host may wait for the number of those that are not masked; ``None``: on a CPU.
        """
        if not (device_type(indices) == "cpu" if known is None else known):
            served = ServedAsFarAsKnown.of(indices, order)
            return cls(axes, Groups(indices.numel(), served.ends), served.choice, True, served.slot, False)
        n = int(order.starts[-1])
        slot = invert(order.sorted).view(indices.shape)
        return cls(
            axes, Groups(n, order.starts[1:].int()), order.sorted[:n], False, slot.clamp(max=n), n < slot.numel()
        )

    @property
    def communicates(self) -> bool:
        """Whether anything passes between ranks."""
        return self.axes.shard.size > 1

    def start_send(self, rows: Tensor) -> UnderWay[Tensor]:
        return Ready(rows)

    def start_bring(self, rows: Tensor) -> UnderWay[Tensor]:
        return Ready(self.axes.sum_own(rows))


@dataclass(frozen=True)
class CapacityExchange(Exchange):
    """By buffers of equal shape.

    Args:
        experts: E.
    """

    experts: int

    def start_send(self, rows: Tensor) -> UnderWay[Tensor]:
        buffer = rows.view(self.experts, -1, rows.shape[1])  # [E, c, D]
        return Then(start_all_to_all(buffer, self.axes.expert), self._arrived)

    def _arrived(self, received: Tensor) -> Tensor:
        by_sender = all_gather(received, 0, self.axes.gather)  # [senders * e, c, D]
        return by_sender.unflatten(0, (self._senders, -1)).transpose(0, 1).flatten(0, 2)

    def start_bring(self, rows: Tensor) -> UnderWay[Tensor]:
        here = self.experts // self.axes.expert.size
        by_sender = rows.view(here, self._senders, -1, rows.shape[-1]).transpose(0, 1).flatten(0, 1)
        return Then(start_all_to_all(self.axes.sum_own(by_sender), self.axes.expert), self._home)

    def _home(self, buffer: Tensor) -> Tensor:  # [E, c, D]
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

    def start_send(self, rows: Tensor) -> UnderWay[Tensor]:
        return Then(start_all_to_all(rows, self.axes.expert, self.received, self.sent), self._arrived)

    def _arrived(self, received: Tensor) -> Tensor:
        gathered = all_gather(received, 0, self.axes.gather, self.gathered)
        return gathered if self.by_expert is None else gathered.index_select(0, self.by_expert)

    def start_bring(self, rows: Tensor) -> UnderWay[Tensor]:
        by_sender = rows if self.by_sender is None else rows.index_select(0, self.by_sender)
        own = self.axes.sum_own(by_sender, self.gathered)
        return start_all_to_all(own, self.axes.expert, self.sent, self.received)


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
class ChunkedExchange:
    """The exchange of one forward as that of one or several chunks of its rows, one after the other.

    Args:
        chunks: the exchanges.
        tokens: how many consecutive tokens each is of; ``None``: each is of all of them.
        beside: while one chunk is computed others are under way.
        kept: what has arrived is kept for the backward; else it comes again.
    """

    chunks: Sequence[Exchange]
    tokens: Sequence[int] | None = None
    beside: bool = True
    kept: bool = True

    @property
    def rows(self) -> int:
        """Rows that come to the experts held here."""
        return sum(chunk.rows for chunk in self.chunks)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """What each chunk takes of tokens [t, ..]."""
        return [x] * len(self.chunks) if self.tokens is None else x.split(list(self.tokens))

    def joined(self) -> Joined:
        """For what the chunks give of tokens [t, ..]."""
        return Joined(self.tokens is not None)


def even_parts(total: int, parts: int) -> list[int]:
    """Sizes of so many consecutive parts, as equal as can be, larger ones first: of no larger total is one larger."""
    return [total // parts + (part < total % parts) for part in range(parts)]


class Joined:
    """What comes of chunks one by one: put together where they are of different tokens, else summed, in fp32."""

    def __init__(self, together: bool) -> None:
        self._together = together
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        """The next chunk's, which may be overwritten."""
        self._dtype = part.dtype
        if self._together or not self._parts:
            self._parts.append(part)
        else:
            wide = torch.promote_types(part.dtype, torch.float32)
            self._parts = [self._parts[0].to(wide).add_(part)]

    def result(self) -> Tensor:
        """When all have been added."""
        parts, self._parts = self._parts, []
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self._dtype)


@leaf
def _masked_as_empty(choices: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    total = choices.shape[0]
    choice = torch.where(torch.arange(total, device=choices.device) < starts[-1], choices, total)
    ends = starts[1:].to(torch.int32)
    ends[-1:] = total
    return choice, ends
