"""Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.exchange import DroplessExchange, to_experts
from lightning_tex.moe.permute import group_by_expert, invert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.collectives import all_gather, all_to_all, gather, split

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


@dataclass(frozen=True)
class DroplessDispatcher(Dispatcher):
    """Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        axes, top_k = self.axes, route.indices.shape[1]
        tokens = self._tokens(len(route.indices))
        # Duplicate-token dropping (paper section 5.1): of tokens that tensor ranks hold alike, each sends its own.
        own = split(x.reshape(-1, x.shape[-1]), 0, axes.split, tokens)  # [t, D]
        weights = split(route.weights, 0, axes.split, tokens)
        indices = route.indices.split(tokens)[axes.split.rank]
        order = group_by_expert(indices.flatten(), self.num_experts)
        counts = order.starts.diff()  # [E] choices of own tokens
        counts_here = all_to_all(counts.view(axes.expert.size, -1), axes.expert, operation="exchange_counts")  # [P, e]
        counts_gathered = all_gather(counts_here[None], 0, axes.gather, operation="exchange_counts")  # [gather, P, e]
        sent = counts.view(axes.expert.size, -1).sum(1).tolist()
        received, gathered = counts_here.sum(1).tolist(), counts_gathered.sum((1, 2)).tolist()

        choice = order.sorted[: sum(sent)]
        row = torch.full_like(order.sorted, sum(sent))
        row[choice] = torch.arange(sum(sent), device=x.device)
        expert = torch.arange(counts_gathered.shape[-1], device=x.device).expand_as(counts_gathered).flatten()
        by_expert = expert.repeat_interleave(counts_gathered.flatten()).sort(stable=True).indices
        exchange = DroplessExchange(
            axes, row.view(-1, top_k), choice, sent, received, gathered, by_expert, invert(by_expert)
        )
        metadata = DispatchMetadata(exchange, weights, x.dtype, row.new_zeros(()), tokens)
        return Arrived(to_experts(own, exchange), counts_gathered.sum((0, 1)).tolist()), metadata

    def combine(self, outputs: Tensor, metadata: DispatchMetadata) -> Tensor:
        own = metadata.weighted_sum(outputs)
        return gather(own, 0, self.axes.split, metadata.split_tokens)

    def _tokens(self, total: int) -> list[int]:
        """Tokens of each rank of the split axis."""
        ranks = self.axes.split.size
        return [total // ranks + (rank < total % ranks) for rank in range(ranks)]
