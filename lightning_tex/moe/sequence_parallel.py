"""A capacity for tokens that sequence parallelism has split over tensor already."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_tex.moe.capacity import Capacity, queues
from lightning_tex.moe.dispatch import Arrived, DispatchMetadata
from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.permute import group_by_expert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.collectives import all_gather, own_slice
from lightning_tex.parallel.replay import decided
from lightning_tex.parallel.topology import Axis

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


@dataclass(frozen=True)
class SequenceShardedCapacityDispatcher(DroplessDispatcher):
    """Capacity where each tensor rank holds its own part of every sequence: [.., s, D].

    Who overflows is decided as it is for whole sequences, from counts exchanged over tensor. The rest travels as it
    does without capacity: a buffer of static shape would need every slot on every rank.

    Args:
        capacity: as in :class:`CapacityDispatcher`.
        tensor: the axis the sequences are split over.
    """

    capacity: Capacity
    tensor: Axis

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        over = decided("which choices overflow", lambda: self._overflowing(route, x.shape[:-2].numel()))
        indices = route.indices.masked_fill(over, self.num_experts)
        arrived, metadata = super().dispatch(x, route._replace(indices=indices))
        return arrived, replace(metadata, overflowed=over.sum(), counts=None)

    def _overflowing(self, route: Route, sequences: int) -> Tensor:  # -> [T, k]
        indices = route.indices
        allowed = self.capacity.of(indices.shape[1], len(indices) * self.tensor.size, self.num_experts)
        if route.priority is None:
            places = places_among_all(indices, sequences, self.num_experts, self.tensor)
        else:
            places = places_by_priority(indices, route.priority, sequences, self.num_experts, self.tensor)
        return (places >= allowed) & (indices < self.num_experts)


def places_among_all(indices: Tensor, sequences: int, num_experts: int, tensor: Axis) -> Tensor:
    """The place of each choice in its expert's queue over all tensor ranks: first choices first, then by token.

    The same queue as in :func:`~lightning_tex.moe.capacity.assign_slots`, which has all tokens at hand.

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
    turn = torch.arange(top_k * sequences, device=indices.device)  # (choice, sequence), in the order of the queue
    experts = indices.t().reshape(len(turn), -1)  # [k * B, s]
    order = group_by_expert((experts + queues * turn[:, None]).flatten(), len(turn) * queues)
    counts = order.starts.diff().view(-1, queues)  # [k * B, E + 1]
    by_rank = all_gather(counts[:, None], 1, tensor, operation="exchange_counts")  # [k * B, tensor, E + 1]
    counts_of_all = by_rank.flatten(0, 1)  # [k * B * tensor, E + 1], in the order of the queue
    before = (counts_of_all.cumsum(0) - counts_of_all).view(-1, tensor.size, queues)[:, tensor.rank]
    experts_in_order = order.experts.int()
    within = torch.arange(indices.numel(), device=indices.device) - order.starts[experts_in_order]
    places = torch.empty_like(within)
    places[order.sorted] = within + before.flatten()[experts_in_order]
    return places.view(top_k, -1).t()


def places_by_priority(indices: Tensor, priority: Tensor, sequences: int, num_experts: int, tensor: Axis) -> Tensor:
    """The same where tokens with more priority come first: choices and priorities are exchanged, not tokens.

    Args:
        indices: [B * s, k] expert of each own choice, E where masked.
        priority: [B * s].
        sequences: B.
        num_experts: E.
        tensor: ranks hold consecutive parts, s long, of each sequence.

    Returns:
        [B * s, k]
    """
    top_k, length = indices.shape[1], len(indices) // max(sequences, 1)

    def of_all(own: Tensor) -> Tensor:  # [B * s, ..] -> [B * s * tensor, ..]
        by_sequence = own.view(sequences, length, *own.shape[1:])
        return all_gather(by_sequence, 1, tensor, operation="exchange_counts").flatten(0, 1)

    place = queues(of_all(indices), num_experts, 0, of_all(priority)).place
    return own_slice(place.view(sequences, length * tensor.size, top_k), 1, tensor).flatten(0, 1)
