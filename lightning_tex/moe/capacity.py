"""Experts that take up to a capacity of choices: static shapes, and choices that overflow."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.exchange import CapacityExchange, to_experts
from lightning_tex.moe.permute import group_by_expert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.collectives import all_reduce

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


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

    The same queue as :func:`~lightning_tex.moe.sequence_parallel.places_among_all`, where all tokens are here.

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
class CapacityDispatcher(Dispatcher):
    """Every expert takes up to ceil(factor * k * T / E) choices of each rank's T tokens; shapes are static.

    Ranks of an expert group may hold different T: buffers take the largest capacity, overflow the own.

    Args:
        factor: the capacity factor.
    """

    factor: float

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        tokens, top_k = route.indices.shape
        allowed = capacity(self.factor, top_k, tokens, self.num_experts)
        largest = int(all_reduce(torch.tensor([allowed], device=x.device), self.axes.expert, "max", "exchange_counts"))
        rows = buffer_rows(largest, self.axes.split.size)
        slots = assign_slots(route.indices, self.num_experts, allowed, rows)
        exchange = CapacityExchange(self.axes, slots.slot, slots.choice.view(self.num_experts, rows))
        arrived = to_experts(x.reshape(-1, x.shape[-1]), exchange)
        experts = self.num_experts // self.axes.expert.size
        metadata = DispatchMetadata(exchange, route.weights, x.dtype, slots.overflowed)
        return Arrived(arrived, [len(arrived) // experts] * experts), metadata

    def combine(self, outputs: Tensor, metadata: DispatchMetadata) -> Tensor:
        return metadata.weighted_sum(outputs)


def capacity(factor: float, top_k: int, tokens: int, num_experts: int) -> int:
    """Choices that one expert takes of ``tokens`` tokens."""
    # A product like 1.1 * 10 lies an ulp above 11 and must not take another slot for it.
    return ceil(factor * top_k * tokens / num_experts - 1e-9)


def buffer_rows(allowed: int, split: int) -> int:
    """Rows of the buffer for one expert: its capacity, rounded up to a multiple of the ranks that split it."""
    return -(-allowed // split) * split
