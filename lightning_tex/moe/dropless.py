"""Every choice is served: rows travel by uneven all-to-all with exchanged sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.exchange import (
    ChunkedExchange,
    DroplessExchange,
    Exchange,
    LocalExchange,
    ServedAsFarAsKnown,
    even_parts,
)
from lightning_tex.moe.permute import Order, group_by_expert, invert
from lightning_tex.moe.router import Route
from lightning_tex.parallel.all_to_all import all_to_all
from lightning_tex.parallel.collectives import all_gather, gather, split
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.replay import decided

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


@dataclass(frozen=True)
class DroplessDispatcher(Dispatcher):
    """Every choice is served: rows travel by uneven all-to-all with exchanged sizes.

    Args:
        sparse: most choices are masked, as where experts choose: the host waits for their number also where it could do
            with a row for each.
    """

    sparse: bool = field(default=False, kw_only=True)

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        tokens = self._tokens(len(route.indices))
        # Duplicate-token dropping (paper section 5.1): of tokens that tensor ranks hold alike, each sends its own.
        own = split(x.reshape(-1, x.shape[-1]), 0, self.axes.split, tokens)  # [t, D]
        weights = split(route.weights, 0, self.axes.split, tokens)
        indices = route.indices.split(tokens)[self.axes.split.rank]
        exchange, counts = decided("the dropless exchange", lambda: self._exchange(indices, tokens))
        if self.axes.split.size > 1:
            counts = None  # of the own part only
        metadata = DispatchMetadata(x.dtype, x.new_zeros((), dtype=torch.int64), counts, tokens)
        return Arrived.by(exchange, own, weights), metadata

    def combine(self, outputs: Tensor, metadata: DispatchMetadata) -> Tensor:
        return gather(super().combine(outputs, metadata), 0, self.axes.split, metadata.split_tokens)

    def _exchange(self, indices: Tensor, tokens: list[int]) -> tuple[Exchange | ChunkedExchange, Tensor | None]:
        """The exchange of own choices [t, k], and how many of them fell on each expert: [E].

        Args:
            tokens: of each rank of the split axis.
        """
        axes = self.axes
        known = self.sparse or device_type(indices) == "cpu"  # the host may wait for the number of rows
        if axes.expert.size > 1 or (axes.gather.size > 1 and known):
            return self._travelling(indices)
        order = group_by_expert(indices.flatten(), self.num_experts)
        counts = order.starts.diff()
        if axes.gather.size == 1:
            return LocalExchange.of(axes, indices, order, known), counts
        return self._gathered(indices, order, tokens), counts

    def _travelling(self, indices: Tensor) -> tuple[Exchange | ChunkedExchange, Tensor]:
        axes, chunks = self.axes, self.axes.chunks
        own_tokens = even_parts(len(indices), chunks)
        order = group_by_expert(_by_chunk(indices, own_tokens, self.num_experts).flatten(), chunks * self.num_experts)
        counts = order.starts.diff().view(chunks, self.num_experts)
        # One exchange of counts for all chunks.
        by_rank = counts.view(chunks, axes.expert.size, -1).transpose(0, 1)  # [P, chunks, e]
        here = all_to_all(by_rank, axes.expert, operation="exchange_counts")  # [P, chunks, e]
        gathered = all_gather(here[None], 0, axes.gather, operation="exchange_counts")  # [gather, P, chunks, e]
        sums = by_rank.sum(2).t(), here.sum(2).t(), gathered.sum((1, 3)).t(), gathered.sum((0, 1))  # [chunks, ..]
        # The one thing that the host waits for.
        numbers = torch.cat(sums, 1).tolist()
        slot, row, token, exchanges = invert(order.sorted).view(indices.shape), 0, 0, []
        for chunk, tokens in enumerate(own_tokens):
            sent, received, arriving, sizes = _split(numbers[chunk], *(part.shape[1] for part in sums))
            choice, own_slot = order.sorted[row : row + sum(sent)], slot[token : token + tokens]
            if chunks > 1:  # counted from the chunk's first token, and from its first row
                choice, own_slot = choice - token * indices.shape[1], own_slot - row
            by_sender = gathered[:, :, chunk].flatten(0, 1)
            exchanges.append(DroplessExchange.of(axes, choice, own_slot, sent, received, arriving, sizes, by_sender))
            row, token = row + sum(sent), token + tokens
        if chunks == 1:
            return exchanges[0], counts[0]
        return ChunkedExchange(exchanges, own_tokens), counts.sum(0)

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
        return even_parts(total, self.axes.split.size)


def _by_chunk(indices: Tensor, tokens: list[int], num_experts: int) -> Tensor:
    """Choices [t, k] as choices of experts by chunk, those of the first chunk's first; the masked ones last of all.

    Args:
        tokens: of each chunk.
    """
    if len(tokens) == 1:
        return indices
    keys = [part + chunk * num_experts for chunk, part in enumerate(indices.split(tokens))]
    return torch.cat(keys).masked_fill(indices == num_experts, len(tokens) * num_experts)


def _split(numbers: list[int], *lengths: int) -> list[list[int]]:
    """Consecutive parts of these lengths."""
    ends = list(accumulate(lengths))
    return [numbers[end - length : end] for end, length in zip(ends, lengths, strict=True)]
