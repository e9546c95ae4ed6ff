"""Tokens to their experts and back: what is sent where, and how it is put together again (paper sections 3 and 5.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tex.collectives import all_gather, all_reduce, all_to_all, gather, split
from lightning_tex.moe.permute import group_by_expert, invert
from lightning_tex.moe.router import Route
from lightning_tex.moe.travel import CapacityWay, DroplessWay, Lanes, bring, send
from lightning_tex.topology import Axis

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


class Arrived(NamedTuple):
    """Rows at the experts held here: [N, D], grouped by expert, with the number of rows of each of the e experts."""

    rows: Tensor
    sizes: list[int]


@dataclass(frozen=True)
class Dispatcher(ABC):
    """The way to the experts and back.

    Args:
        num_experts: E.
        lanes: the axes of the way.
    """

    num_experts: int
    lanes: Lanes

    @abstractmethod
    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, Any]:
        """Send [.., D] tokens to their experts. Returns what arrived here and what the way back needs.

        The dims before the last are T in all: a route's tokens are x's in their order.
        """

    @abstractmethod
    def combine(self, rows: Tensor, journey: Any) -> Tensor:
        """Bring [N, D] expert outputs back and sum them by their weights: [T, D]. An overflowed choice adds 0.

        The outputs are partial sums over the axis the experts are cut over; they are summed on the way.
        """

    @abstractmethod
    def overflow(self, journey: Any) -> Tensor:
        """How many choices overflowed their expert's capacity: a scalar, of this rank's tokens."""


# --- capacity


class Slots(NamedTuple):
    """Places of choices in a buffer of E x C rows.

    slot:    [T, k] the row of each choice; E * C where it overflowed or is masked.
    choice:  [E * C] the choice t * k + i in each row; T * k where the row is empty.
    overflowed: scalar count, masked choices not included.
    """

    slot: Tensor
    choice: Tensor
    overflowed: Tensor


def assign_slots(indices: Tensor, num_experts: int, capacity: int, rows: int) -> Slots:
    """Give choices places: all first choices in token order, then all second choices, until an expert is full.

    Args:
        indices: [T, k] expert of each choice, E where masked.
        num_experts: E.
        capacity: choices an expert takes.
        rows: rows of the buffer per expert, at least ``capacity``.
    """
    tokens, top_k = indices.shape
    order = group_by_expert(indices.t().flatten(), num_experts)
    place = torch.arange(tokens * top_k, device=indices.device) - order.starts[order.experts]
    fits = (place < capacity) & (order.experts < num_experts)
    row = torch.where(fits, order.experts * rows + place, num_experts * rows)
    # Choice j of the first-choices-first list is token j % T, choice j // T.
    choice = order.sorted % max(tokens, 1) * top_k + order.sorted // max(tokens, 1)
    slot = torch.empty_like(row)
    slot[choice] = row
    filled = row.new_full((num_experts * rows + 1,), tokens * top_k)
    filled[row] = torch.where(fits, choice, tokens * top_k)
    return Slots(slot.view(tokens, top_k), filled[:-1], order.starts[-1] - fits.sum())


@dataclass(frozen=True)
class CapacityJourney:
    """What the way back needs: the way, each choice's weight [T, k], the dtype of the tokens, what overflowed."""

    way: CapacityWay
    weights: Tensor
    dtype: torch.dtype
    overflowed: Tensor


@dataclass(frozen=True)
class CapacityDispatcher(Dispatcher):
    """Every expert takes up to ceil(factor * k * T / E) choices of each rank's T tokens; shapes are static.

    Ranks of an expert group may hold different T: buffers take the largest capacity, overflow the own.
    """

    factor: float

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, CapacityJourney]:
        tokens, top_k = route.indices.shape
        allowed = capacity(self.factor, top_k, tokens, self.num_experts)
        largest = torch.tensor([allowed], device=x.device)
        rows = _round_up(int(all_reduce(largest, self.lanes.expert, "max", "exchange_counts")), self.lanes.split.size)
        slots = assign_slots(route.indices, self.num_experts, allowed, rows)
        way = CapacityWay(self.lanes, slots.slot, slots.choice.view(self.num_experts, rows))
        arrived = send(x.reshape(-1, x.shape[-1]), way)
        experts = self.num_experts // self.lanes.expert.size
        journey = CapacityJourney(way, route.weights, x.dtype, slots.overflowed)
        return Arrived(arrived, [len(arrived) // experts] * experts), journey

    def combine(self, rows: Tensor, journey: CapacityJourney) -> Tensor:
        return _weighted_sum(bring(rows, journey.way), journey.weights, journey.dtype)

    def overflow(self, journey: CapacityJourney) -> Tensor:
        return journey.overflowed


# --- dropless


@dataclass(frozen=True)
class DroplessJourney:
    """What the way back needs.

    way: the way; tokens: tokens of each rank of the split axis; weights: [t, k] of the own; the dtype of the tokens.
    """

    way: DroplessWay
    tokens: list[int]
    weights: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class DroplessDispatcher(Dispatcher):
    """Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DroplessJourney]:
        lanes, top_k = self.lanes, route.indices.shape[1]
        tokens = _shares(len(route.indices), lanes.split.size)
        own = split(x.reshape(-1, x.shape[-1]), 0, lanes.split, tokens)  # [t, D]
        weights = split(route.weights, 0, lanes.split, tokens)
        indices = route.indices.split(tokens)[lanes.split.rank]
        order = group_by_expert(indices.flatten(), self.num_experts)
        counts = order.starts.diff()  # [E] choices of own tokens
        received = all_to_all(counts.view(lanes.expert.size, -1), lanes.expert, operation="exchange_counts")  # [P, e]
        everywhere = all_gather(received[None], 0, lanes.gather, operation="exchange_counts")  # [gather, P, e]
        leave = counts.view(lanes.expert.size, -1).sum(1).tolist()
        arrive, gathered = received.sum(1).tolist(), everywhere.sum((1, 2)).tolist()

        choice = order.sorted[: sum(leave)]
        row = torch.full_like(order.sorted, sum(leave))
        row[choice] = torch.arange(sum(leave), device=x.device)
        expert = torch.arange(everywhere.shape[-1], device=x.device).expand_as(everywhere).flatten()
        by_expert = expert.repeat_interleave(everywhere.flatten()).sort(stable=True).indices
        order_there = by_expert, invert(by_expert)
        way = DroplessWay(lanes, row.view(-1, top_k), choice, leave, arrive, gathered, *order_there)
        journey = DroplessJourney(way, tokens, weights, x.dtype)
        return Arrived(send(own, way), everywhere.sum((0, 1)).tolist()), journey

    def combine(self, rows: Tensor, journey: DroplessJourney) -> Tensor:
        own = _weighted_sum(bring(rows, journey.way), journey.weights, journey.dtype)
        return gather(own, 0, self.lanes.split, journey.tokens)

    def overflow(self, journey: DroplessJourney) -> Tensor:
        return journey.way.slot.new_zeros(())


# --- capacity, with tokens that are split already (sequence parallelism)


@dataclass(frozen=True)
class SplitCapacityDispatcher(Dispatcher):
    """Capacity where each tensor rank holds its own part of every sequence: [.., s, D].

    Who overflows is decided as it is for whole sequences, from counts exchanged over tensor. The rest travels as it
    does without capacity: a buffer of static shape would need every slot on every rank.

    Args:
        factor: as in :class:`CapacityDispatcher`.
        tensor: the axis the sequences are split over.
    """

    factor: float
    tensor: Axis

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, tuple[DroplessJourney, Tensor]]:
        tokens = len(route.indices) * self.tensor.size
        allowed = capacity(self.factor, route.indices.shape[1], tokens, self.num_experts)
        sequences = x.shape[:-2].numel()
        places = places_among_all(route.indices, sequences, self.num_experts, self.tensor)
        over = (places >= allowed) & (route.indices < self.num_experts)
        indices = route.indices.masked_fill(over, self.num_experts)
        arrived, journey = self._dropless().dispatch(x, route._replace(indices=indices))
        return arrived, (journey, over.sum())

    def combine(self, rows: Tensor, journey: tuple[DroplessJourney, Tensor]) -> Tensor:
        return self._dropless().combine(rows, journey[0])

    def overflow(self, journey: tuple[DroplessJourney, Tensor]) -> Tensor:
        return journey[1]

    def _dropless(self) -> DroplessDispatcher:
        return DroplessDispatcher(self.num_experts, self.lanes)


def places_among_all(indices: Tensor, sequences: int, num_experts: int, tensor: Axis) -> Tensor:
    """The place of each choice in its expert's queue over all tensor ranks: first choices first, then by token.

    An exclusive scan: a rank's choices of a sequence come after those of earlier ranks, and those of all ranks for
    earlier sequences. Counts are exchanged, not tokens.

    Args:
        indices: [B * s, k] expert of each own choice, E where masked.
        sequences: B.
        num_experts: E.
        tensor: ranks hold consecutive parts, s long, of each sequence.

    Returns:
        [B * s, k]
    """
    top_k = indices.shape[1]
    queues = num_experts + 1  # one more for the masked
    part = torch.arange(top_k * sequences, device=indices.device)  # (choice, sequence), in the order of the queue
    experts = indices.t().reshape(len(part), -1)  # [k * B, s]
    order = group_by_expert((experts + queues * part[:, None]).flatten(), len(part) * queues)
    counts = order.starts.diff().view(-1, queues)  # [k * B, E + 1]
    everywhere = all_gather(counts[:, None], 1, tensor, operation="exchange_counts").flatten(
        0, 1
    )  # [k * B * tensor, ..]
    before = (everywhere.cumsum(0) - everywhere).view(-1, tensor.size, queues)[:, tensor.rank]
    within = torch.arange(indices.numel(), device=indices.device) - order.starts[order.experts]
    places = torch.empty_like(within)
    places[order.sorted] = within + before.flatten()[order.experts]
    return places.view(top_k, -1).t()


def capacity(factor: float, top_k: int, tokens: int, num_experts: int) -> int:
    """Choices that one expert takes of ``tokens`` tokens."""
    # A product like 1.1 * 10 lies an ulp above 11 and must not take another slot for it.
    return ceil(factor * top_k * tokens / num_experts - 1e-9)


def _weighted_sum(outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:  # [t * k, D], [t, k] -> [t, D]
    return (outputs.view(*weights.shape, outputs.shape[-1]) * weights[..., None]).sum(1).to(dtype)


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
