"""Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata, arrive
from lightning_tex.moe.exchange import DroplessExchange, Exchange, LocalExchange, ServedAsFarAsKnown
from lightning_tex.moe.permute import Order, group_by_expert, invert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.collectives import all_gather, all_to_all, gather, split
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.replay import decided

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


@dataclass(frozen=True)
class DroplessDispatcher(Dispatcher):
    """Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        tokens = self._tokens(len(route.indices))
        # Duplicate-token dropping (paper section 5.1): of tokens that tensor ranks hold alike, each sends its own.
        own = split(x.reshape(-1, x.shape[-1]), 0, self.axes.split, tokens)  # [t, D]
        weights = split(route.weights, 0, self.axes.split, tokens)
        indices = route.indices.split(tokens)[self.axes.split.rank]
        exchange, counts = decided("the dropless exchange", lambda: self._exchange(indices, tokens))
        if self.axes.split.size > 1:
            counts = None  # of the own part only
        metadata = DispatchMetadata(exchange, x.dtype, x.new_zeros((), dtype=torch.int64), counts, tokens)
        return arrive(own, weights, exchange), metadata

    def combine(self, outputs: Tensor, metadata: DispatchMetadata) -> Tensor:
        return gather(super().combine(outputs, metadata), 0, self.axes.split, metadata.split_tokens)

    def _exchange(self, indices: Tensor, tokens: list[int]) -> tuple[Exchange, Tensor | None]:
        """The exchange of own choices [t, k], and how many of them fell on each expert: [E].

        Args:
            tokens: of each rank of the split axis.
        """
        order = group_by_expert(indices.flatten(), self.num_experts)
        counts, axes = order.starts.diff(), self.axes
        if axes.expert.size == axes.gather.size == 1:
            return LocalExchange.of(axes, indices, order), counts
        if axes.expert.size == 1 and device_type(indices) != "cpu":
            return self._gathered(indices, order, tokens), counts
        return self._travelling(indices, order, counts), counts

    def _travelling(self, indices: Tensor, order: Order, counts: Tensor) -> DroplessExchange:
        axes = self.axes
        by_rank = counts.view(axes.expert.size, -1)  # [P, e]
        counts_here = all_to_all(by_rank, axes.expert, operation="exchange_counts")  # [P, e]
        counts_gathered = all_gather(counts_here[None], 0, axes.gather, operation="exchange_counts")  # [gather, P, e]
        by_sender = counts_gathered.flatten(0, 1)  # [senders, e]
        # The one thing that the host waits for.
        numbers = torch.cat([by_rank.sum(1), counts_here.sum(1), counts_gathered.sum((1, 2)), by_sender.sum(0)])
        sent, received, gathered, sizes = _split(numbers.tolist(), len(by_rank), len(by_rank), axes.gather.size)
        slot = invert(order.sorted).view(indices.shape)
        return DroplessExchange.of(axes, order.sorted[: sum(sent)], slot, sent, received, gathered, sizes, by_sender)

    def _gathered(self, indices: Tensor, order: Order, tokens: list[int]) -> DroplessExchange:
        """Without an expert axis every rank sends all its choices, masked ones as empty rows: no count is asked for."""
        axes, top_k = self.axes, indices.shape[1]
        # Tokens that are not split here are equal shares already.
        gathered = [top_k * n for n in (tokens if axes.split.size > 1 else tokens * axes.gather.size)]
        served = ServedAsFarAsKnown.of(indices, order)
        counts = served.ends.diff(prepend=served.ends.new_zeros(1)).long()
        by_sender = all_gather(counts[None], 0, axes.gather, operation="exchange_counts")  # [senders, e]
        sent = [indices.numel()]
        return DroplessExchange.of(axes, served.choice, served.slot, sent, sent, gathered, None, by_sender, gaps=True)

    def _tokens(self, total: int) -> list[int]:
        """Tokens of each rank of the split axis."""
        ranks = self.axes.split.size
        return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def _split(numbers: list[int], *lengths: int) -> list[list[int]]:
    """Consecutive parts of these lengths, and the rest."""
    parts = []
    for length in lengths:
        parts.append(numbers[:length])
        numbers = numbers[length:]
    return [*parts, numbers]
