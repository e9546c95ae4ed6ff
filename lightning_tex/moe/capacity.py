"""Experts that take up to a capacity of choices: static shapes, and choices that overflow."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.exchange import CapacityExchange, ChunkedExchange, Exchange, LocalExchange, even_parts
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import group_by_expert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.collectives import own_slice
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.host_numbers import highest
from lightning_tex.parallel.replay import decided

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


# Which tokens come first where an expert's capacity is not enough for all: earlier ones, or those with a larger score.
Precedence = Literal["position", "score"]


@dataclass
class Capacity:
    """How many choices an expert takes of a data rank's tokens in a micro-step, and whose come first.

    Args:
        factor: of the even share, in training.
        eval_factor: in evaluation; ``None``: the same.
        least: as many at least, where there are as many tokens (min_capacity).
        precedence: ``"position"``: tokens in their order; ``"score"``: those first whose largest score is larger
            (batch-prioritised routing, arXiv 2106.05974, section 4). Either way all first choices before all second.
        training: which factor counts now.

    Raises:
        ValueError: what is not positive, or another word.
    """

    factor: float
    eval_factor: float | None = None
    least: int = 0
    precedence: Precedence = "position"
    training: bool = True

    def __post_init__(self) -> None:
        for name, factor in (("capacity_factor", self.factor), ("eval_capacity_factor", self.eval_factor)):
            if factor is not None and factor <= 0:
                raise UserValueError(f"{name}={factor} must be positive, or None for dropless routing")
        if self.least < 0:
            raise UserValueError(f"min_capacity={self.least}; legal: 0, or above")
        if self.precedence not in get_args(Precedence):
            legal = ", ".join(map(repr, get_args(Precedence)))
            raise UserValueError(f"overflow_by={self.precedence!r}; legal: {legal}")

    @classmethod
    def of_options(
        cls, factor: float | None, eval_factor: float | None, least: int, precedence: Precedence
    ) -> Capacity | None:
        """That of a layer's options; ``None``: dropless.

        Raises:
            ValueError: options of a capacity where there is none.
        """
        if factor is not None:
            return cls(factor, eval_factor, least, precedence)
        if eval_factor is not None or least or precedence != "position":
            raise UserValueError(
                f"eval_capacity_factor={eval_factor}, min_capacity={least}, overflow_by={precedence!r} with "
                "capacity_factor=None, where nothing overflows; legal: None, 0 and 'position', or a capacity_factor"
            )
        return None

    def alike_on_all_ranks(self) -> dict[str, Any]:
        """The options of the layer that this is made of."""
        return {
            "capacity_factor": self.factor,
            "eval_capacity_factor": self.eval_factor,
            "min_capacity": self.least,
            "overflow_by": self.precedence,
        }

    def of(self, top_k: int, tokens: int, num_experts: int) -> int:
        """Choices that one expert takes of ``tokens`` tokens."""
        factor = self.factor if self.training or self.eval_factor is None else self.eval_factor
        return capacity(factor, top_k, tokens, num_experts, self.least)


class Queues(NamedTuple):
    """Queues of choices at their experts: all first choices in token order, then all second ones, and so on.

    place:      [T, k] of each choice in its expert's queue, from 0; without meaning where it is masked.
    counts:     [E] length of each queue.
    overflowed: scalar, how many choices find their expert full; masked ones are none.
    """

    place: Tensor
    counts: Tensor
    overflowed: Tensor


def queues(indices: Tensor, num_experts: int, capacity: int, priority: Tensor | None = None) -> Queues:
    """The queues of choices [T, k]; E stands for a masked choice.

    The same as :func:`~lightning_tex.moe.sequence_parallel.places_among_all`, where all tokens are here.

    Args:
        num_experts: E.
        capacity: choices an expert takes.
        priority: [T], of the route; ``None``: tokens stand in their order.
    """
    if priority is not None:
        tokens_in_order = priority.argsort(descending=True, stable=True)
        place, *rest = queues(indices[tokens_in_order], num_experts, capacity)
        return Queues(torch.empty_like(place).index_copy_(0, tokens_in_order, place), *rest)
    tokens, top_k = indices.shape
    order = group_by_expert(indices.t().flatten(), num_experts)
    within = torch.arange(tokens * top_k, device=indices.device) - order.starts[order.experts.int()]
    place = torch.empty_like(within).scatter_(0, order.sorted, within)
    counts = order.starts.diff()
    return Queues(place.view(top_k, tokens).t(), counts, (counts - capacity).clamp(min=0).sum())


class Slots(NamedTuple):
    """Places of choices in a buffer of E x C rows.

    slot:    [T, k] the row of each choice; E * C where it overflowed or is masked.
    choice:  [E * C] the choice t * k + i in each row; T * k where the row is empty.
    """

    slot: Tensor
    choice: Tensor


def assign_slots(indices: Tensor, place: Tensor, num_experts: int, capacity: int, rows: int) -> Slots:
    """Give the first choices of each queue their rows, until the expert is full.

    Args:
        indices: [T, k] expert of each choice, E where masked.
        place: [T, k] of each choice in its expert's queue.
        num_experts: E.
        capacity: choices an expert takes.
        rows: rows of the buffer per expert, at least ``capacity``.
    """
    fits = (place < capacity) & (indices < num_experts)
    slot = torch.where(fits, indices * rows + place, num_experts * rows)
    choices = torch.arange(indices.numel(), device=indices.device)
    # Choices without a row all write to the one behind the last, which is nobody's.
    choice = slot.new_full((num_experts * rows + 1,), indices.numel()).scatter_(0, slot.flatten(), choices)
    return Slots(slot, choice[:-1])


@dataclass(frozen=True)
class CapacityDispatcher(Dispatcher):
    """Every expert takes up to a capacity of choices of each rank's T tokens; shapes are static.

    Ranks of an expert group may hold different T: buffers take the largest capacity, overflow the own. They agree on it
    over the hosts' network, as nobody's device has to be asked for it.

    Args:
        capacity: how many, and whose.
    """

    capacity: Capacity

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        exchange, counts, overflowed = decided("the exchange by capacity", lambda: self._exchange(route))
        metadata = DispatchMetadata(x.dtype, overflowed, counts)
        return Arrived.by(exchange, x.reshape(-1, x.shape[-1]), route.weights), metadata

    def queues(self, indices: Tensor, allowed: int, priority: Tensor | None) -> Queues:
        """In which order choices [T, k] are served."""
        return queues(indices, self.num_experts, allowed, priority)

    def allowed(self, tokens: int, top_k: int) -> int:
        """Choices that an expert takes of this rank's tokens."""
        return self.capacity.of(top_k, tokens, self.num_experts)

    def _exchange(self, route: Route) -> tuple[Exchange | ChunkedExchange, Tensor, Tensor]:
        """The exchange of the choices, how many fell on each expert, and how many overflowed."""
        indices = route.indices
        tokens, top_k = indices.shape
        allowed, axes = self.allowed(tokens, top_k), self.axes
        place, counts, overflowed = self.queues(indices, allowed, route.priority)
        if max(axes.expert.size, axes.split.size, axes.gather.size) == 1:
            served = indices.masked_fill(place >= allowed, self.num_experts)
            return (
                LocalExchange.of(axes, served, group_by_expert(served.flatten(), self.num_experts)),
                counts,
                overflowed,
            )
        rows = buffer_rows(highest(allowed, axes.expert_host), axes.split.size)
        slots = assign_slots(indices, place, self.num_experts, allowed, rows)
        return self._in_chunks(slots, rows), counts, overflowed

    def _in_chunks(self, slots: Slots, rows: int) -> ChunkedExchange:
        """Of every expert's rows, a part in each chunk, as far as there are any."""
        axes, experts = self.axes, self.num_experts
        # Duplicate-token dropping (paper section 5.1): of rows that tensor ranks hold alike, each sends its own.
        own = own_slice(slots.choice.view(experts, rows), 1, axes.split)  # [E, c]
        here, senders, ranks = experts // axes.expert.size, axes.expert.size * axes.gather.size, axes.split.size
        exchanges, start = [], 0
        for width in even_parts(own.shape[1], max(1, min(axes.chunks, own.shape[1]))):
            choice, slot = own[:, start : start + width].flatten(), slots.slot
            if width < own.shape[1]:
                coming = experts * ranks * width
                place = slot.new_full((experts * rows + 1,), coming)  # of each row of the whole buffer, in the chunk's
                of_chunk = place[:-1].view(experts, ranks, -1)[:, :, start : start + width]
                of_chunk.copy_(torch.arange(coming, device=slot.device).view(of_chunk.shape))
                slot = place[slot]
            groups = Groups.equal(here, width * senders, slot.device)
            exchanges.append(CapacityExchange(axes, groups, choice, True, slot, True, experts))
            start += width
        return ChunkedExchange(exchanges)


def capacity(factor: float, top_k: int, tokens: int, num_experts: int, least: int = 0) -> int:
    """Choices that one expert takes of ``tokens`` tokens: ceil(factor * k * T / E), but ``least`` or T at least."""
    # A product like 1.1 * 10 lies an ulp above 11 and must not take another slot for it.
    return max(ceil(factor * top_k * tokens / num_experts - 1e-9), min(least, tokens))


def buffer_rows(allowed: int, split: int) -> int:
    """Rows of the buffer for one expert: its capacity, rounded up to a multiple of the ranks that split it."""
    return -(-allowed // split) * split
