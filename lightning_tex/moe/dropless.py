"""Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.moe.dispatch import Arrived, Dispatcher, weighted_sum
from lightning_tex.moe.exchange import DroplessWay, bring, send
from lightning_tex.moe.permute import group_by_expert, invert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.collectives import all_gather, all_to_all, gather, split

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


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
        own = weighted_sum(bring(rows, journey.way), journey.weights, journey.dtype)
        return gather(own, 0, self.lanes.split, journey.tokens)

    def overflow(self, journey: DroplessJourney) -> Tensor:
        return journey.way.slot.new_zeros(())


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
